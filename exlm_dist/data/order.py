"""Which sample is at which position of the endless stream: a pure function, whose cost does not depend on n.

Position p belongs to epoch p // n, and is sample perm(p % n) of it, where perm is a Feistel network over the grid
[0, a) x [0, b) with a = ceil(sqrt(n)), b = ceil(n / a) (Black & Rogaway, "Ciphers with arbitrary finite domains",
CT-RSA 2002: a generalised Feistel network, and cycle walking for the fewer than a cells beyond n). No table is stored:
resuming at position 10^9 costs as much as starting at 0.
"""

from __future__ import annotations

import math

import numpy as np

from exlm_dist.data.counter_rng import PURPOSE_ORDER, hash_of, mix, words_at

ROUNDS = 8


def sample_at(positions: np.ndarray, seed: int, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Epoch and sample id of each global position.

    `positions` int64[m] >= 0; `num_samples` n >= 1. Returns (epoch int64[m], sample id int64[m] in [0, n)). Every
    sample occurs exactly once in each epoch.
    """
    if num_samples < 1:
        raise ValueError(f"an order needs at least one sample, not {num_samples}")
    epochs, within = np.divmod(np.asarray(positions, np.int64), num_samples)
    samples = np.empty_like(within)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        samples[here] = permute(within[here], seed, int(epoch), num_samples)
    return epochs, samples


def permute(indices: np.ndarray, seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """perm(i) for each i of `indices` (int64[m] in [0, n)), a bijection of [0, n) keyed by (seed, epoch)."""
    columns = math.isqrt(num_samples - 1) + 1
    rows = -(-num_samples // columns)
    keys = words_at(hash_of(PURPOSE_ORDER, seed, epoch), np.arange(ROUNDS))
    result = _rounds(indices.astype(np.uint64), keys, columns, rows)
    outside = np.flatnonzero(result >= num_samples)
    while outside.size:
        walked = _rounds(result[outside], keys, columns, rows)
        result[outside] = walked
        outside = outside[walked >= num_samples]
    return result.astype(np.int64)


def _rounds(values: np.ndarray, keys: np.ndarray, columns: int, rows: int) -> np.ndarray:
    """One pass through the network, from cells (uint64) of the grid to cells; each round shifts one coordinate."""
    high, low = np.divmod(values, np.uint64(columns))
    for index, key in enumerate(keys):
        if index % 2:
            low = _shift(low, mix(high ^ key), columns)
        else:
            high = _shift(high, mix(low ^ key), rows)
    return high * np.uint64(columns) + low


def _shift(coordinates: np.ndarray, words: np.ndarray, size: int) -> np.ndarray:
    """(coordinates + words) modulo `size`, words reduced first: a sum that wraps at 2^64 would not be a bijection."""
    modulus = np.uint64(size)
    return (coordinates + words % modulus) % modulus
