"""Copies of each token, and which tokens are wholly hidden."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from prepared_folder import random_sequences, write_folder

from exlm_dist.data.masking import choose_masked, num_masks, sample_keys
from exlm_dist.data.repeated import wholly_hidden, with_copies
from exlm_dist.data.shards import ShardDataset


class Rows:
    """A data set in memory."""

    def __init__(self, *rows: list[int]) -> None:
        self.rows = rows
        self.lengths = np.array([len(row) for row in rows], np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def preload(self, blocks: list[int]) -> None:
        """All are in memory."""

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate([self.rows[i] for i in ids]), self.lengths[ids].astype(np.int64)


def test_each_token_stands_side_by_side():
    rows = Rows([7, 8], [9])
    made = with_copies(rows, 3)
    tokens, lengths = made.read(np.array([1, 0]))
    assert tokens.tolist() == [9, 9, 9, 7, 7, 7, 8, 8, 8] and lengths.tolist() == [3, 6]
    assert made.lengths.tolist() == [6, 3] and len(made) == 2
    assert with_copies(rows, 1) is rows


def test_prepared_data_keeps_its_index_and_its_blocks(tmp_path: Path) -> None:
    rows = random_sequences(300)
    folder = write_folder(tmp_path / "data", rows)
    sizes = np.array([3 * len(row) for row in rows])
    made = with_copies(ShardDataset.open(folder, "train", block=50, kept_blocks=4), 3)
    ids = np.array([250, 3, 299])
    assert made.lengths[ids].tolist() == sizes[ids].tolist() and made.lengths[:7].tolist() == sizes[:7].tolist()
    assert (made.lengths.min(), made.lengths.max()) == (sizes.min(), sizes.max())
    assert made.lengths.mean() == pytest.approx(sizes.mean())
    made.preload([5])
    for file in folder.rglob("*.tar"):
        file.write_bytes(b"")
    tokens, lengths = made.read(np.array([251, 250]))  # from memory
    assert tokens.tolist() == np.repeat(np.concatenate([rows[251], rows[250]]), 3).tolist()
    assert lengths.tolist() == sizes[[251, 250]].tolist()


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_wholly_hidden_is_what_a_loop_finds(copies):
    random = np.random.default_rng(copies)
    indices = np.flatnonzero(random.uniform(size=60 * copies) < 0.7)
    masked = set(indices.tolist())
    expected = [all(copies * (index // copies) + one in masked for one in range(copies)) for index in indices.tolist()]
    assert wholly_hidden(indices, copies).tolist() == expected and any(expected)


def test_a_fraction_p_to_the_power_of_k_of_the_tokens_is_hidden():
    """Masks are drawn without replacement, so of long sequences all but as if each was drawn by itself."""
    ratio, copies, count, length = 0.6, 3, 60, 200
    lengths, samples = np.full(count, copies * length), np.arange(count)
    keys = sample_keys(0, np.zeros_like(samples), samples)
    indices = choose_masked(lengths, num_masks(lengths, keys, ratio), keys)
    hidden = wholly_hidden(indices, copies).sum() / copies / (count * length)
    assert hidden == pytest.approx(ratio**copies, abs=0.01)
    assert len(indices) / lengths.sum() == pytest.approx(ratio, abs=0.001)
