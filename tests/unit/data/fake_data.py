"""A data set in memory, for tests of everything that comes after reading."""

from __future__ import annotations

import threading

import numpy as np

from exlm_dist.tokenizers.tokenizer import NUM_SPECIAL


class FakeDataset:
    """Sequences of the given lengths; the ids tell which sample and position each token comes from."""

    def __init__(self, lengths: np.ndarray, vocab_size: int = 512) -> None:
        self.lengths = np.asarray(lengths, np.int32)
        self.vocab_size = vocab_size
        self.reads = 0
        self.threads: set[str] = set()
        self.preloaded: list[int] = []

    def __len__(self) -> int:
        return len(self.lengths)

    def preload(self, blocks: list[int]) -> None:
        self.preloaded += blocks

    def payload(self, sample: int) -> np.ndarray:
        positions = np.arange(self.lengths[sample])
        return (NUM_SPECIAL + (sample * 7 + positions * 13) % (self.vocab_size - NUM_SPECIAL)).astype(np.int32)

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.reads += 1
        self.threads.add(threading.current_thread().name)
        return np.concatenate([self.payload(int(sample)) for sample in ids]), self.lengths[ids].astype(np.int64)


def varied_lengths(count: int, low: int = 3, high: int = 60, seed: int = 0) -> np.ndarray:
    """`count` lengths in [low, high]."""
    return np.random.default_rng(seed).integers(low, high + 1, count)
