"""The packed micro-batch that the model reads: plain arrays, no padding between sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackedBatch:
    """B sequences one after another; T tokens, S = k N states, N targets, each padded up to a bucket (T', S', N').

    All arrays are int64 (is_masked: bool) and C-contiguous. Sequence b has the tokens cu_tokens[b]:cu_tokens[b+1], the
    states cu_states[b]:cu_states[b+1] and the targets cu_targets[b]:cu_targets[b+1].
    """

    input_ids: np.ndarray  # [T'] past T: PAD
    position: np.ndarray  # [T'] index in the unexpanded sequence, BOS is 0; past T: 0
    clone: np.ndarray  # [T'] 0 for ordinary tokens, 1..k for states; past T: 0
    cu_tokens: np.ndarray  # [B+1]
    state_index: np.ndarray  # [S'] index into [T'] of each state, ascending; past S: 0
    cu_states: np.ndarray  # [B+1]
    target_ids: np.ndarray  # [N'] past N: PAD
    cu_targets: np.ndarray  # [B+1]
    is_masked: np.ndarray  # bool[N'] target is a masked token; False for BOS/EOS anchors and padding
    sample_ids: np.ndarray  # [B]; all -1 in a filler (evaluation), which must not be counted
    epochs: np.ndarray  # [B]
    states: int  # k
    step: int
    index: int  # of the micro-batch within the global batch
    num_original_tokens: int  # unexpanded, BOS and EOS included

    @property
    def num_sequences(self) -> int:
        """B."""
        return len(self.sample_ids)

    @property
    def num_tokens(self) -> int:
        """T, expanded tokens without padding."""
        return int(self.cu_tokens[-1])

    @property
    def num_states(self) -> int:
        """S without padding."""
        return int(self.cu_states[-1])

    @property
    def num_targets(self) -> int:
        """N without padding."""
        return int(self.cu_targets[-1])

    @property
    def max_tokens(self) -> int:
        """Expanded tokens of the longest sequence."""
        return int(np.diff(self.cu_tokens).max())

    @property
    def max_states(self) -> int:
        """States of the sequence with the most."""
        return int(np.diff(self.cu_states).max())

    @property
    def max_targets(self) -> int:
        """Targets of the sequence with the most."""
        return int(np.diff(self.cu_targets).max())

    @property
    def padding_fraction(self) -> float:
        """Fraction of the T' tokens that is bucket padding."""
        return 1.0 - self.num_tokens / len(self.input_ids)
