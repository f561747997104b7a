"""The samples of a split in blocks, which are read and kept in memory as a whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Blocks:
    """Blocks of `size` consecutive samples. Each of the `forms` of `samples` molecules has blocks of its own, of which
    the last may be short, as an epoch reads one form alone (`order.py`)."""

    size: int
    samples: int
    forms: int = 1

    def __len__(self) -> int:
        return self._of_form * self.forms

    @property
    def _of_form(self) -> int:
        return -(-self.samples // self.size)

    def of(self, ids: np.ndarray) -> np.ndarray:
        """int64[m]: the block of each sample (int64[m])."""
        form, sample = np.divmod(ids, self.samples)
        return form * self._of_form + sample // self.size

    def bounds(self, block: int) -> tuple[int, int]:
        """The first sample of a block, and the one after its last."""
        form, place = divmod(block, self._of_form)
        first = form * self.samples
        return first + place * self.size, first + min((place + 1) * self.size, self.samples)
