"""Sequences in which every token stands several times in a row, for the study of what a mask does to a sequence.

With k copies of each token, each masked with probability p, a fraction p of the positions shows [MASK], a token that no
text has, but only p^k of the tokens are hidden: of the others a copy can be seen. So the two effects of masking can be
told apart: k = 1 has both at once (repeated MLM, section 3 of arXiv 2501.13397).
"""

from __future__ import annotations

import numpy as np

from exlm_dist.data.recipe import Dataset


def with_copies(dataset: Dataset, copies: int) -> Dataset:
    """The data set with so many copies of each token; itself for one."""
    return dataset if copies == 1 else RepeatedTokens(dataset, copies)


class RepeatedTokens:
    """A data set with `copies` of each token of another one, side by side; samples keep their numbers."""

    def __init__(self, dataset: Dataset, copies: int) -> None:
        self._dataset, self.copies = dataset, copies
        self.lengths = dataset.lengths * copies

    def __len__(self) -> int:
        return len(self._dataset)

    def preload(self, blocks: list[int]) -> None:
        """See `ShardDataset.preload`: blocks are of samples, which keep their numbers."""
        self._dataset.preload(blocks)

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, lengths) of the samples, both with all copies."""
        tokens, lengths = self._dataset.read(ids)
        return np.repeat(tokens, self.copies), lengths * self.copies


def wholly_hidden(indices: np.ndarray, copies: int) -> np.ndarray:
    """bool[N]: which of the masked positions (flat, ascending, of sequences with `copies` of each token) belong to a
    token of which every copy is masked."""
    _, place, masked = np.unique(indices // copies, return_inverse=True, return_counts=True)
    return masked[place] == copies
