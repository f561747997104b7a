"""What the layers pass on: a packed micro-batch with its hidden states, and in the end its likelihoods.

Letters: T expanded tokens, B sequences, D width, P head width, S states, N targets (largest of a sequence: N_max), L
states of a sequence (largest: L_max), k states per expanded position.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Stream:
    """A packed micro-batch on its way through the layers; index tensors are int64 on the model's device.

    Sequence b owns the tokens `cu_tokens[b]:cu_tokens[b+1]`, the states `cu_states[b]:...` (indices into the tokens)
    and the targets `cu_targets[b]:...`. Beyond the last boundary is padding, on which no result depends. The maxima are
    Python ints, so that no layer has to wait for the device to learn a size.
    """

    input_ids: Tensor  # [T]
    position: Tensor  # [T] index in the unexpanded sequence, from 0
    clone: Tensor  # [T] 0 for ordinary tokens, 1..k for states
    cu_tokens: Tensor  # [B+1]
    state_index: Tensor  # [S]
    cu_states: Tensor  # [B+1]
    target_ids: Tensor  # [N]
    cu_targets: Tensor  # [B+1]
    dropout_seed: Tensor  # [1] determines every dropout mask
    max_tokens: int
    max_states: int
    max_targets: int
    states: int  # k
    predict: bool = False  # ask the output layer for `prior` and all that is below it
    select: bool = True  # the last block drops all but the states, which are all that the output layer reads
    hidden: Tensor | None = None  # [T, D]; [S, D] once only the states are left
    selected: bool = False  # whether `hidden` is [S, D]
    angles: Tensor | None = None  # [T, P/2] fp32, computed once by the first block
    match: Tensor | None = None  # [B, N_max, L_max] log p(target i | state u)
    transitions: Tensor | None = None  # [B, L_max, L_max] log p(u | v); None for the plain masked language model
    ends: int = 1  # a path starts at one of the first and ends at one of the last `ends` states
    log_likelihood: Tensor | None = None  # [B]
    prior: Tensor | None = None  # [B, N_max, L_max] probability by the transitions that a state emits a target
    log_weight: Tensor | None = None  # [B] log of the weight of all paths by the transitions
    predictions: Tensor | None = None  # [B, N_max] most probable token of each target
    token_spread: Tensor | None = None  # [B, N_max] how much the tokens of a target's own k states differ

    @staticmethod
    def from_batch(batch: Any, device: torch.device | str = "cpu", dropout_seed: int = 0) -> Stream:
        """Stream of a `data.batch.PackedBatch` (numpy) on `device`; `dropout_seed` determines every dropout mask."""
        arrays = [torch.from_numpy(getattr(batch, name)) for name in _ARRAYS[:-1]]
        arrays.append(torch.tensor([dropout_seed]))
        moved = _through_pinned(arrays, device) if torch.device(device).type == "cuda" else arrays
        sizes = {name: int(getattr(batch, name)) for name in ("max_tokens", "max_states", "max_targets", "states")}
        return Stream(**dict(zip(_ARRAYS, moved)), **sizes).to(device)

    def replace(self, **changes: Any) -> Stream:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def aligned(self, multiple: int) -> Stream:
        """The same micro-batch with T and S padded to a `multiple`; the padding belongs to no sequence."""
        tokens, states = (-len(rows) % multiple for rows in (self.input_ids, self.state_index))
        if not tokens and not states:
            return self
        by_token = {name: F.pad(getattr(self, name), (0, tokens)) for name in ("input_ids", "position", "clone")}
        return self.replace(**by_token, state_index=F.pad(self.state_index, (0, states)))

    def to(self, device: torch.device | str) -> Stream:
        """A copy with every tensor on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Stream(**{name: v.to(device) if isinstance(v, Tensor) else v for name, v in moved.items()})

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.cu_tokens.numel() - 1

    @property
    def num_states(self) -> Tensor:
        """States of each sequence, [B]."""
        return self.cu_states.diff()

    @property
    def num_targets(self) -> Tensor:
        """Targets of each sequence, [B]."""
        return self.cu_targets.diff()

    def expanded_index(self, tokens: Tensor) -> Tensor:
        """Index of each of `tokens` (indices into T, of any shape) in its own expanded sequence, from 0.

        For padding tokens it is counted from the last boundary.
        """
        return tokens - self.cu_tokens[torch.bucketize(tokens, self.cu_tokens, right=True) - 1]

    def padded(self, values: Tensor, boundaries: Tensor, longest: int, fill: Any) -> Tensor:
        """Packed `values` [X, ...] as [B, longest, ...], with `fill` after the end of each sequence."""
        offset = torch.arange(longest, device=values.device)
        index = boundaries[:-1, None] + offset
        inside = index < boundaries[1:, None]
        inside = inside.reshape(*inside.shape, *[1] * (values.dim() - 1))
        return values[index.clamp(max=len(values) - 1)].masked_fill(~inside, fill)

    def by_target(self, values: Tensor, fill: Any) -> Tensor:
        """Packed `values` [N, ...] of the targets as [B, N_max, ...], with `fill` after the end of each sequence."""
        return self.padded(values, self.cu_targets, self.max_targets, fill)


#: Tensors that a model reads: the arrays of a packed batch, and the seed.
_ARRAYS = (
    "input_ids",
    "position",
    "clone",
    "cu_tokens",
    "state_index",
    "cu_states",
    "target_ids",
    "cu_targets",
    "dropout_seed",
)
#: Elements to which each array is aligned in the common buffer (64 bytes).
_ALIGNMENT = 8


def _through_pinned(arrays: list[Tensor], device: torch.device | str) -> list[Tensor]:
    """int64 `arrays` copied to a GPU in one transfer; from pageable memory the host would wait for earlier work."""
    spans = [-(-len(array) // _ALIGNMENT) * _ALIGNMENT for array in arrays]
    staging = torch.empty(sum(spans), dtype=torch.int64, pin_memory=True)
    for span, array in zip(staging.split(spans), arrays):
        span[: len(array)].copy_(array)
    whole = staging.to(device, non_blocking=True)
    return [part[: len(array)] for part, array in zip(whole.split(spans), arrays)]
