"""From sequences with marked positions to the expanded stream: each marked position becomes k states (ExLM).

Everything is counted, nothing searched: the j-th target of the batch stands at source index s_j, so j positions before
it were expanded and its first state is token s_j + (k - 1) j of the expanded stream.
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
    position: np.ndarray  # [T] place in the unexpanded sequence, from 0
    clone: np.ndarray  # [T] 0 for ordinary tokens, 1..k for the states of an expanded position
    state_index: np.ndarray  # [S] index into [T] of each state, ascending; S = k N
    target_ids: np.ndarray  # [N]
    is_masked: np.ndarray  # bool[N] False for anchors
    cu_tokens: np.ndarray  # [B+1]
    cu_targets: np.ndarray  # [B+1]; cu_states is k times this


@dataclass(frozen=True)
class Source:
    """Unexpanded sequences, each from BOS to EOS, and the places in them that get expanded."""

    input_ids: np.ndarray  # int64[sum of lengths]
    lengths: np.ndarray  # int64[B]
    target_places: np.ndarray  # int64[N] flat indices, ascending
    target_ids: np.ndarray  # int64[N]
    is_masked: np.ndarray  # bool[N]


def expanded_lengths(lengths: np.ndarray, counts: np.ndarray, states: int, anchors: bool) -> np.ndarray:
    """int64[B]: tokens of each expanded sequence, from its payload length and number of masks alone."""
    return lengths + 2 + (states - 1) * (counts + 2 * anchors)


def wrap(tokens: np.ndarray, lengths: np.ndarray, masks: Masks, anchors: bool) -> Source:
    """Put BOS and EOS around each payload, what the model sees at the masked places, and list the targets.

    `tokens` int[sum], `lengths` int64[B]: the payload. With `anchors`, BOS and EOS are targets too, the first and the
    last of each sequence.
    """
    ends = np.cumsum(lengths + 2)
    starts = ends - lengths - 2
    source = np.empty(ends[-1] if len(ends) else 0, np.int64)
    inner = np.ones(len(source), bool)
    inner[starts] = inner[ends - 1] = False
    source[inner] = tokens
    source[starts], source[ends - 1] = BOS, EOS
    sequence = np.repeat(np.arange(len(lengths)), masks.counts)
    places = masks.places + 2 * sequence + 1
    targets = source[places]
    source[places] = masks.visible
    masked = np.ones(len(places), bool)
    if anchors:
        flags = np.zeros(len(source), bool)
        flags[places] = flags[starts] = flags[ends - 1] = True
        masked = inner[flags]
        places = np.flatnonzero(flags)
        all_targets = np.empty(len(places), np.int64)
        all_targets[masked] = targets
        first = np.cumsum(masks.counts + 2) - masks.counts - 2
        all_targets[first], all_targets[first + masks.counts + 1] = BOS, EOS
        targets = all_targets
    return Source(source, lengths + 2, places, targets, masked)


def expand(source: Source, states: int) -> Expanded:
    """Give each target place `states` = k consecutive copies of what stands there, numbered 1..k."""
    places, extra = source.target_places, states - 1
    cu_source = np.concatenate([[0], np.cumsum(source.lengths)])
    cu_targets = np.searchsorted(places, cu_source)
    copies = np.ones(len(source.input_ids), np.int64)
    copies[places] = states
    within = np.arange(len(source.input_ids)) - np.repeat(cu_source[:-1], source.lengths)
    first = places + extra * np.arange(len(places))
    numbers = np.arange(states)
    clone = np.zeros(len(source.input_ids) + extra * len(places), np.int64)
    state_index = (first[:, None] + numbers).reshape(-1)
    clone[state_index] = np.tile(numbers + 1, len(places))
    return Expanded(
        input_ids=np.repeat(source.input_ids, copies),
        position=np.repeat(within, copies),
        clone=clone,
        state_index=state_index,
        target_ids=source.target_ids,
        is_masked=source.is_masked,
        cu_tokens=cu_source + extra * cu_targets,
        cu_targets=cu_targets,
    )
