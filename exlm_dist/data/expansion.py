"""From sequences with marked positions to expanded sequences: each marked position becomes k states (ExLM).

Nothing is searched for: if the j-th target of the batch is at flat index s_j, then j positions before it are expanded
and its first state is at flat index s_j + (k - 1) j of the expanded batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from exlm_dist.data.masking import Masks
from exlm_dist.tokenizers.tokenizer import BOS, EOS


@dataclass(frozen=True)
class Expanded:
    """An expanded ragged batch of B sequences: T tokens, S states, N targets; int64 unless said otherwise."""

    input_ids: np.ndarray  # [T]
    position: np.ndarray  # [T] index in the unexpanded sequence, from 0
    clone: np.ndarray  # [T] 0 for ordinary tokens, 1..k for the states of an expanded position
    state_index: np.ndarray  # [S] index into [T] of each state, ascending; S = k N
    target_ids: np.ndarray  # [N]
    is_masked: np.ndarray  # bool[N] False for anchors
    cu_tokens: np.ndarray  # [B+1]
    cu_targets: np.ndarray  # [B+1]; cu_states is k times this


@dataclass(frozen=True)
class MarkedSequences:
    """Unexpanded sequences, each from BOS to EOS, and the targets: the positions to expand."""

    input_ids: np.ndarray  # int64[sum of lengths]
    lengths: np.ndarray  # int64[B]
    target_indices: np.ndarray  # int64[N] into `input_ids`, ascending
    target_ids: np.ndarray  # int64[N]
    is_masked: np.ndarray  # bool[N]


def expanded_lengths(lengths: np.ndarray, counts: np.ndarray, states: int, anchors: bool) -> np.ndarray:
    """int64[B]: length of each expanded sequence, from its payload length and number of masks alone."""
    return lengths + 2 + (states - 1) * (counts + 2 * anchors)


def wrap(tokens: np.ndarray, lengths: np.ndarray, masks: Masks, anchors: bool) -> MarkedSequences:
    """Put BOS and EOS around each payload, replace masked tokens by what the model sees, and list the targets.

    `tokens` int[sum], `lengths` int64[B]: the payload. With `anchors`, BOS and EOS are targets too, the first and the
    last of each sequence.
    """
    ends = np.cumsum(lengths + 2)
    starts = ends - lengths - 2
    input_ids = np.empty(ends[-1] if len(ends) else 0, np.int64)
    inner = np.ones(len(input_ids), bool)
    inner[starts] = inner[ends - 1] = False
    input_ids[inner] = tokens
    input_ids[starts], input_ids[ends - 1] = BOS, EOS
    sequence = np.repeat(np.arange(len(lengths)), masks.counts)
    indices = masks.indices + 2 * sequence + 1
    targets = input_ids[indices]
    input_ids[indices] = masks.visible
    masked = np.ones(len(indices), bool)
    if anchors:
        flags = np.zeros(len(input_ids), bool)
        flags[indices] = flags[starts] = flags[ends - 1] = True
        masked = inner[flags]
        indices = np.flatnonzero(flags)
        all_targets = np.empty(len(indices), np.int64)
        all_targets[masked] = targets
        first = np.cumsum(masks.counts + 2) - masks.counts - 2
        all_targets[first], all_targets[first + masks.counts + 1] = BOS, EOS
        targets = all_targets
    return MarkedSequences(input_ids, lengths + 2, indices, targets, masked)


def expand(marked: MarkedSequences, states: int) -> Expanded:
    """Replace each target position by `states` = k consecutive copies of its token, numbered 1..k."""
    indices, extra = marked.target_indices, states - 1
    cu_unexpanded = np.concatenate([[0], np.cumsum(marked.lengths)])
    cu_targets = np.searchsorted(indices, cu_unexpanded)
    copies = np.ones(len(marked.input_ids), np.int64)
    copies[indices] = states
    position = np.arange(len(marked.input_ids)) - np.repeat(cu_unexpanded[:-1], marked.lengths)
    first = indices + extra * np.arange(len(indices))
    numbers = np.tile(np.arange(states), len(indices))
    state_index = np.repeat(first, states) + numbers
    clone = np.zeros(len(marked.input_ids) + extra * len(indices), np.int64)
    clone[state_index] = numbers + 1
    source = np.repeat(np.arange(len(marked.input_ids)), copies)
    return Expanded(
        input_ids=marked.input_ids[source],
        position=position[source],
        clone=clone,
        state_index=state_index,
        target_ids=marked.target_ids,
        is_masked=marked.is_masked,
        cu_tokens=cu_unexpanded + extra * cu_targets,
        cu_targets=cu_targets,
    )
