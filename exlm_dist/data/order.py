"""Which sample is at which position of the endless stream: a pure function, whose cost does not depend on n.

Position p belongs to epoch p // n. Within an epoch the order is a permutation of [0, n) keyed by (seed, epoch), without
any table: resuming at position 10^9 costs as much as starting at 0. Where n molecules are stored in several forms (as
random SMILES), one form after another, epoch e has each of them in form e modulo the number of forms. There are two:

* `full`: sample perm(p % n). Any sample can follow any other.
* `windows`: the samples, in the order of the index, are cut into blocks of `block`, and the blocks into as many
  consecutive groups as a window has blocks. Each window takes one block of each group, a different one in every epoch,
  and its samples are permuted. A window thus has a piece of every part of the data, in the proportions of the whole,
  and each block is needed within one window only: it is read once, as one piece, whatever the size of the data.

perm is a Feistel network over the grid [0, a) x [0, b) with a = ceil(sqrt(n)), b = ceil(n / a) (Black & Rogaway,
"Ciphers with arbitrary finite domains", CT-RSA 2002: a generalised Feistel network, and cycle walking for the fewer
than a cells beyond n).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from exlm_dist.config.data_settings import DataConfig
from exlm_dist.data.counter_rng import (
    PURPOSE_BLOCKS,
    PURPOSE_ORDER,
    PURPOSE_ROTATION,
    PURPOSE_WINDOW,
    hash_of,
    mix,
    words_at,
)

ROUNDS = 8


@dataclass(frozen=True)
class Order:
    """The order of `num_samples` samples: `full` if `block` is 0, else windows of `window` blocks. With `forms` there
    are as many samples of each form, stored one form after another, of which each epoch has one form."""

    seed: int
    num_samples: int
    block: int = 0  # samples
    window: int = 1  # blocks
    forms: int = 1

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"an order needs at least one sample, not {self.num_samples}")
        if self.block < 0 or self.window < 1:
            raise ValueError(f"windows of {self.window} blocks of {self.block} samples")
        if self.forms < 1:
            raise ValueError(f"samples in {self.forms} forms")

    @classmethod
    def of(cls, data: DataConfig, seed: int, num_samples: int, forms: int = 1) -> Order:
        """The order of training, with so many samples in an epoch."""
        return cls(seed, num_samples, data.block if data.shuffle == "windows" else 0, data.window, forms)

    @property
    def starts(self) -> np.ndarray:
        """int64[2]: the first sample of the only source, and the number of samples in all forms."""
        return np.array([0, self.num_samples * self.forms], np.int64)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and sample id of each global position.

        `positions` int64[m] >= 0. Returns (epoch int64[m], sample id int64[m] in [0, n x forms)). Every sample of the
        epoch's form occurs exactly once in it.
        """
        epochs, within = np.divmod(np.asarray(positions, np.int64), self.num_samples)
        samples = np.empty_like(within)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            if self.block:
                samples[here] = self._in_windows(within[here], epoch)
            else:
                samples[here] = permute(within[here], self.num_samples, PURPOSE_ORDER, self.seed, epoch)
        return epochs, samples + epochs % self.forms * self.num_samples

    def upcoming(self, positions: np.ndarray) -> list[int]:
        """Blocks to read ahead while these positions (int64[m]) are used, for the window after theirs.

        Over an epoch each block comes once, at an even pace: one for every `block` positions.
        """
        epochs, places = np.divmod(np.asarray(positions, np.int64) + self.window * self.block, self.num_samples)
        begun = np.flatnonzero(places % self.block == 0)
        blocks = []
        for epoch, slot in zip(epochs[begun].tolist(), (places[begun] // self.block).tolist()):
            window = int(self._window_of(np.array([slot]))[0])
            group = np.array([slot - self._first_slot(window)])
            first = epoch % self.forms * self.num_blocks
            blocks += (first + self._block_of(group, window, epoch)).tolist()
        return blocks

    @property
    def num_blocks(self) -> int:
        """Blocks of an epoch in windows."""
        return -(-self.num_samples // self.block)

    @property
    def _windows(self) -> int:
        return -(-self.num_blocks // self.window)

    def _first_slot(self, window: int) -> int:
        """The place of a window's first block among all blocks, window after window. Windows are equal but for one."""
        return window * self.num_blocks // self._windows

    def _window_of(self, slots: np.ndarray) -> np.ndarray:
        """The window that each place of a block (int64[m]) is in."""
        ends = slots + 1
        if self.num_blocks * self._windows >= 1 << 62:  # int64 does not hold these products
            ends = ends.astype(object)
        return ((ends * self._windows - 1) // self.num_blocks).astype(np.int64)

    def _in_windows(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        """Sample at each position (int64[m] in [0, n)) of an epoch whose samples are permuted in windows."""
        samples = np.empty_like(positions)
        of = self._window_of(positions // self.block)
        for window in np.unique(of).tolist():
            here = of == window
            start = self._first_slot(window) * self.block
            end = min(self._first_slot(window + 1) * self.block, self.num_samples)
            key = (PURPOSE_WINDOW, self.seed, epoch, window)
            group, offset = np.divmod(permute(positions[here] - start, end - start, *key), self.block)
            samples[here] = self._block_of(group, window, epoch) * self.block + offset
        return samples

    def _block_of(self, group: np.ndarray, window: int, epoch: int) -> np.ndarray:
        """The block that a window takes of each `group` (int64[m]), one of as many blocks as there are windows.

        It takes one of each whole group: the windows are permuted, and each group rotates them by a draw of its own.
        The last group may be short: its blocks, permuted, go to windows at equal distances, all but the last of them,
        which may be short itself and is always the last of the last window.
        """
        windows = self._windows
        whole, in_last = divmod(self.num_blocks - 1, windows)
        drawn = _drawn(window, windows, self.seed, epoch)
        rotation = hash_of(PURPOSE_ROTATION, self.seed, epoch, group) % np.uint64(windows)
        member = (drawn + rotation.astype(np.int64)) % windows
        of_last = group == whole
        if of_last.any():
            place = np.array([window * (in_last + 1) // windows])
            if place < in_last:
                place = permute(place, in_last, PURPOSE_BLOCKS, self.seed, epoch)
            member[of_last] = place
        return group * windows + member


@functools.lru_cache(maxsize=64)
def _drawn(window: int, windows: int, seed: int, epoch: int) -> int:
    """The place of a window in the permutation of the windows of an epoch."""
    return int(permute(np.array([window]), windows, PURPOSE_BLOCKS, seed, epoch)[0])


def permute(indices: np.ndarray, size: int, *key: int) -> np.ndarray:
    """perm(i) for each i of `indices` (int64[m] in [0, size)), a bijection of [0, size) for each `key` (integers)."""
    columns = math.isqrt(size - 1) + 1
    rows = -(-size // columns)
    keys = _round_keys(*key)
    result = _rounds(indices.astype(np.uint64), keys, columns, rows)
    outside = np.flatnonzero(result >= size)
    while outside.size:
        walked = _rounds(result[outside], keys, columns, rows)
        result[outside] = walked
        outside = outside[walked >= size]
    return result.astype(np.int64)


@functools.lru_cache(maxsize=1024)
def _round_keys(*key: int) -> np.ndarray:
    """The key of each round, uint64 [ROUNDS]."""
    return words_at(hash_of(*key), np.arange(ROUNDS))


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
