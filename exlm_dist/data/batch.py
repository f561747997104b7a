"""The packed micro-batch that the model reads: plain arrays, no padding between sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from exlm_dist.tokenizers.tokenizer import PAD


@dataclass(frozen=True)
class PackedBatch:
    """B sequences one after the other; T tokens, S = k N states, N targets, each padded up to a bucket (T', S', N').

    All arrays are int64 (is_masked: bool) and C-contiguous. Sequence b owns tokens cu_tokens[b]:cu_tokens[b+1], states
    cu_states[b]:cu_states[b+1] and targets cu_targets[b]:cu_targets[b+1].
    """

    input_ids: np.ndarray  # [T'] past T: PAD
    position: np.ndarray  # [T'] place in the unexpanded sequence, BOS is 0; past T: 0
    clone: np.ndarray  # [T'] 0 for ordinary tokens, 1..k for states; past T: 0
    cu_tokens: np.ndarray  # [B+1]
    state_index: np.ndarray  # [S'] index into [T'] of each state, ascending; past S: 0
    cu_states: np.ndarray  # [B+1]
    target_ids: np.ndarray  # [N'] past N: PAD
    cu_targets: np.ndarray  # [B+1]
    is_masked: np.ndarray  # bool[N'] target is a masked token; False for BOS/EOS anchors and padding
    sample_ids: np.ndarray  # [B]; -1 in a filler
    epochs: np.ndarray  # [B]
    states: int  # k
    step: int
    index: int  # global number of the micro-batch within the step
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
        """States of the sequence with most."""
        return int(np.diff(self.cu_states).max())

    @property
    def max_targets(self) -> int:
        """Targets of the sequence with most."""
        return int(np.diff(self.cu_targets).max())

    @property
    def padding_fraction(self) -> float:
        """Share of the T' tokens that is bucket padding."""
        return 1.0 - self.num_tokens / len(self.input_ids)

    @property
    def is_filler(self) -> bool:
        """Whether this batch only keeps ranks in step (evaluation): no position is masked; must not be counted."""
        return bool(self.sample_ids[0] < 0)


def check_batch(batch: PackedBatch) -> None:
    """Raise AssertionError, naming the rule, if `batch` breaks what the model relies on."""
    arrays = {name: value for name, value in vars(batch).items() if isinstance(value, np.ndarray)}
    for name, array in arrays.items():
        assert array.dtype == (bool if name == "is_masked" else np.int64) and array.flags.c_contiguous, name
    for name in ("cu_tokens", "cu_states", "cu_targets"):
        bounds = arrays[name]
        assert bounds[0] == 0 and (np.diff(bounds) > 0).all() and len(bounds) == batch.num_sequences + 1, name
    assert (batch.cu_states == batch.states * batch.cu_targets).all(), "k states per target"
    assert len(batch.input_ids) == len(batch.position) == len(batch.clone) >= batch.num_tokens, "tokens"
    assert len(batch.target_ids) == len(batch.is_masked) >= batch.num_targets, "targets"
    assert len(batch.state_index) >= batch.num_states, "states"
    tokens, states, targets = batch.num_tokens, batch.num_states, batch.num_targets
    assert (batch.input_ids[tokens:] == PAD).all() and (batch.target_ids[targets:] == PAD).all(), "padding ids"
    assert not batch.is_masked[targets:].any() and not batch.state_index[states:].any(), "padding of targets and states"
    assert not batch.position[tokens:].any() and not batch.clone[tokens:].any(), "padding places"
    _check_states(batch)


def _check_states(batch: PackedBatch) -> None:
    """The states are exactly the tokens with a clone number, k per target, inside their own sequence."""
    states = batch.state_index[: batch.num_states]
    assert np.array_equal(states, np.flatnonzero(batch.clone)), "states ascend and are the tokens with a clone number"
    numbers = np.arange(1, batch.states + 1)
    assert (batch.clone[states].reshape(-1, batch.states) == numbers).all(), "clones 1..k"
    assert (np.searchsorted(states, batch.cu_tokens) == batch.cu_states).all(), "states lie in their own sequence"
    places = batch.position[states].reshape(-1, batch.states)
    assert (places == places[:, :1]).all(), "clones of one position share it"
    starts = batch.cu_tokens[:-1]
    steps = np.diff(batch.position[: batch.num_tokens])
    inside = np.ones(max(0, batch.num_tokens - 1), bool)
    inside[starts[1:] - 1] = False
    assert (batch.position[starts] == 0).all(), "positions start at 0"
    assert ((steps == 0) | (steps == 1))[inside].all(), "positions count up"
