"""Counter-based random numbers: every value is a hash of the integers that identify it, so there is no state.

The finaliser is that of splitmix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014); `words_at(key, i)` is the i-th output of a splitmix64 generator seeded with `key`. Plain 64-bit integer
arithmetic: the same on every machine and numpy version. Tests freeze its values, because every run depends on them.
"""

from __future__ import annotations

import functools

import numpy as np

GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_1, _FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)

# What a word is drawn for; part of the key, so that every use has a stream of its own.
PURPOSE_ORDER, PURPOSE_COUNT, PURPOSE_POSITION, PURPOSE_CORRUPT, PURPOSE_REPLACE = 1, 2, 3, 4, 5
PURPOSE_BLOCKS, PURPOSE_WINDOW, PURPOSE_ROTATION, PURPOSE_RATIO, PURPOSE_SPAN = 6, 7, 8, 9, 10
PURPOSE_SOURCE, PURPOSE_SMILES = 11, 12


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, a bijection of 64-bit words in which each input bit flips half of the output bits.

    `values` is a uint64 array of at least one dimension; the result is a new array of its shape.
    """
    words = values >> _SHIFT_1
    words ^= values
    words *= _FACTOR_1
    shifted = words >> _SHIFT_2
    words ^= shifted
    words *= _FACTOR_2
    np.right_shift(words, _SHIFT_3, out=shifted)
    words ^= shifted
    return words


def hash_of(*parts: int | np.ndarray) -> np.ndarray:
    """One uint64 per element of the broadcast `parts` (integers >= 0), which depends on every part and their order."""
    integers = 0
    while integers < len(parts) and isinstance(parts[integers], int):
        integers += 1
    state = np.array([_hash_of_integers(*map(int, parts[:integers]))], np.uint64)
    for part in parts[integers:]:
        state = mix((state + GAMMA) ^ np.atleast_1d(np.asarray(part, np.uint64)))
    return state


@functools.lru_cache(maxsize=1024)
def _hash_of_integers(*parts: int) -> int:
    """`hash_of` of integers alone, which most keys begin with."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = mix((state + GAMMA) ^ np.uint64(part))
    return int(state[0])


def words_at(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """The words at the given `counters` (0, 1, ...) of the streams of `keys` (uint64; the two broadcast)."""
    return mix(keys + (counters.astype(np.uint64) + np.uint64(1)) * GAMMA)


def uniform(words: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from the top 53 bits of each word."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
