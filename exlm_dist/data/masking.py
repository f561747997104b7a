"""Which tokens are masked: a pure function of (seed, epoch, sample id), for a whole ragged batch at once.

A ragged batch is `tokens[sum]` with `lengths[B]`; these are payload tokens only, so BOS and EOS, which are added around
them later, are never masked. Every draw is a hash of (purpose, seed, epoch, sample id, position): it does not matter
with which other samples, on which rank or after which restart a sample is masked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from exlm_dist.data.counter_rng import (
    PURPOSE_CORRUPT,
    PURPOSE_COUNT,
    PURPOSE_POSITION,
    PURPOSE_RATIO,
    PURPOSE_REPLACE,
    hash_of,
    uniform,
    words_at,
)
from exlm_dist.data.mask_groups import Grouping
from exlm_dist.tokenizers.tokenizer import MASK, NUM_SPECIAL
from exlm_dist.utils.errors import DataError

# A word of `choose_masked` keeps 48 bits of the hash and has the position in its lowest 16.
POSITION_BITS = 16
MAX_LENGTH = 2**POSITION_BITS - 1
_LOW_BITS = np.uint64(MAX_LENGTH)
_UNUSED = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Masks:
    """The masked tokens of a ragged batch."""

    indices: np.ndarray  # int64[N] into the flat payload tokens, ascending
    counts: np.ndarray  # int64[B] masked tokens of each sequence; their sum is N
    visible: np.ndarray  # int64[N] what the model sees there: MASK, the token itself or a random one


def mask_batch(
    tokens: np.ndarray,
    lengths: np.ndarray,
    keys: np.ndarray,
    *,
    ratio: float,
    keep: float = 0.0,
    random: float = 0.0,
    vocab_size: int,
    spread: float = 0.0,
    grouping: Grouping | None = None,
) -> Masks:
    """Masks of a ragged batch: `tokens` int[sum], `lengths` int64[B], `keys` uint64[B] from `sample_keys`."""
    counts = num_masks(lengths, keys, ratio, spread)
    groups = None if grouping is None else grouping.groups(tokens, lengths, keys)
    indices = choose_masked(lengths, counts, keys, groups)
    visible = visible_tokens(tokens[indices], indices, lengths, counts, keys, keep, random, vocab_size)
    return Masks(indices, counts, visible)


def sample_keys(seed: int, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """uint64[B]: the key of every draw for a sample; `epochs` and `samples` int64[B]."""
    return hash_of(seed, epochs, samples)


def num_masks(lengths: np.ndarray, keys: np.ndarray, ratio: float, spread: float = 0.0) -> np.ndarray:
    """int64[B]: floor(r * length + u), u uniform in [0, 1), as in fairseq; at least 1, at most the length.

    r is `ratio`, or with `spread` uniform in [ratio - spread, ratio + spread). Needs no tokens, so every rank knows the
    number of targets of every sample of a global batch from the index alone.
    """
    chance = uniform(hash_of(PURPOSE_COUNT, keys))
    ratios = ratio + spread * (2 * uniform(hash_of(PURPOSE_RATIO, keys)) - 1) if spread else ratio
    return np.clip(np.floor(ratios * lengths + chance).astype(np.int64), 1, None).clip(max=lengths)


def choose_masked(
    lengths: np.ndarray, counts: np.ndarray, keys: np.ndarray, groups: np.ndarray | None = None
) -> np.ndarray:
    """int64[N]: flat payload indices, ascending, of `counts[b]` tokens of each sequence b, uniform without replacement.

    They are the tokens with the smallest hashes. A tie of the 48 bits kept (2^-48 per pair) goes to the earlier one.
    With `groups` (int64[sum], see `mask_groups.py`) it is the groups that are hashed: those with the smallest hashes
    are masked as a whole, and of the next one the first tokens, as many as the count still asks for.
    DataError for a sequence longer than `MAX_LENGTH`.
    """
    if len(lengths) == 0 or counts.max() == 0:
        return np.zeros(0, np.int64)
    if lengths.max() > MAX_LENGTH:
        raise DataError(
            f"a sequence of {lengths.max()} tokens, masking handles at most {MAX_LENGTH}: "
            "prepare the data with shorter sequences"
        )
    positions = np.arange(lengths.max(), dtype=np.uint64)
    counters = positions
    if groups is not None:
        counters = np.zeros((len(lengths), len(positions)), np.uint64)
        counters[positions < lengths.astype(np.uint64)[:, None]] = groups
    words = words_at(hash_of(PURPOSE_POSITION, keys)[:, None], counters)
    words &= ~_LOW_BITS
    words |= positions
    words[positions >= lengths.astype(np.uint64)[:, None]] = _UNUSED
    words.sort(axis=1)
    chosen = words[:, : counts.max()] & _LOW_BITS
    chosen[np.arange(chosen.shape[1]) >= counts[:, None]] = _UNUSED
    chosen.sort(axis=1)
    starts = np.cumsum(lengths) - lengths
    return (chosen.view(np.int64) + starts[:, None])[chosen != _UNUSED]


def visible_tokens(
    originals: np.ndarray,
    indices: np.ndarray,
    lengths: np.ndarray,
    counts: np.ndarray,
    keys: np.ndarray,
    keep: float,
    random: float,
    vocab_size: int,
) -> np.ndarray:
    """int64[N]: what the model sees of each masked token, by one draw u: the token itself if u < keep, a random
    ordinary one if u < keep + random, else MASK. `originals` int[N]: the tokens; `indices`: their flat payload indices.
    """
    visible = np.full(len(indices), MASK, np.int64)
    if keep + random == 0.0:
        return visible
    starts = np.cumsum(lengths) - lengths
    positions = indices - np.repeat(starts, counts)
    owners = np.repeat(keys, counts)
    chance = uniform(words_at(hash_of(PURPOSE_CORRUPT, owners), positions))
    replaced = (chance >= keep) & (chance < keep + random)
    visible[chance < keep] = originals[chance < keep]
    draws = words_at(hash_of(PURPOSE_REPLACE, owners[replaced]), positions[replaced])
    visible[replaced] = NUM_SPECIAL + (draws % np.uint64(vocab_size - NUM_SPECIAL)).astype(np.int64)
    return visible
