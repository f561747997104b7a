"""Splits against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exlm_dist.finetuning.splits import PARTS, column_split, random_split, repeated_rows, scaffold_split
from exlm_dist.tokenizers.molecules import MoleculeError, murcko_scaffold
from exlm_dist.utils.errors import DataError


def by_definition(scaffolds: list[str], sizes: tuple[float, float, float]) -> list[int]:
    """The part of each row: again and again the largest group that is left, of equal ones that with the latest first
    row, goes into the first part that it fits in whole."""
    count, part = len(scaffolds), [-1] * len(scaffolds)
    left = set(scaffolds)
    while left:
        largest = max(left, key=lambda name: (scaffolds.count(name), scaffolds.index(name)))
        left.remove(largest)
        size = scaffolds.count(largest)
        if part.count(0) + size <= sizes[0] * count:
            chosen = 0
        elif part.count(0) + part.count(1) + size <= (sizes[0] + sizes[1]) * count:
            chosen = 1
        else:
            chosen = 2
        part = [chosen if name == largest else old for name, old in zip(scaffolds, part)]
    return part


@given(
    st.lists(st.sampled_from("abcdefghijklmnop"), min_size=1, max_size=60),
    st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.3, 0.2)]),
)
def test_scaffold_split_is_its_definition(scaffolds: list[str], sizes: tuple[float, float, float]) -> None:
    parts = scaffold_split(scaffolds, sizes)
    wanted = np.array(by_definition(scaffolds, sizes))
    assert all((parts[name] == np.flatnonzero(wanted == number)).all() for number, name in enumerate(PARTS))


@given(st.integers(3, 200), st.integers(0, 5))
def test_random_split_has_every_row_once_and_the_sizes_asked_for(count: int, seed: int) -> None:
    parts = random_split(count, (0.6, 0.3, 0.1), seed)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(count))
    assert all(abs(len(parts[name]) - size * count) <= 1 for name, size in zip(PARTS, (0.6, 0.3, 0.1)))
    again = random_split(count, (0.6, 0.3, 0.1), seed)
    assert all((parts[name] == again[name]).all() for name in PARTS)


def test_another_seed_is_another_random_split() -> None:
    first, second = (random_split(100, (0.5, 0.3, 0.2), seed) for seed in (0, 1))
    assert (first["train"] != second["train"]).any()


def test_column_split_knows_the_usual_names_and_refuses_others() -> None:
    parts = column_split(["Train", "val", "test", " dev ", "validation"], ["?"] * 5, "part")
    assert [parts[name].tolist() for name in PARTS] == [[0], [1, 3, 4], [2]]
    with pytest.raises(DataError, match=r"a.csv: row 2: the column 'part' of the split is 'holdout'"):
        column_split(["train", "holdout"], ["a.csv: row 1", "a.csv: row 2"], "part")


def test_repeated_rows_are_counted_against_all_earlier_parts() -> None:
    parts = {"train": np.array([0, 1]), "valid": np.array([2, 3]), "test": np.array([4, 5, 6])}
    assert repeated_rows(list("abac" + "cad"), parts) == {"valid": 1, "test": 2}


def test_scaffolds_are_rings_and_what_links_them() -> None:
    assert murcko_scaffold("CC(=O)Oc1ccccc1C(=O)O") == "c1ccccc1"
    assert murcko_scaffold("CCO") == ""
    assert murcko_scaffold("OC(c1ccccc1)C1CCNCC1") == "c1ccc(CC2CCNCC2)cc1"
    one, two = "C[C@H]1CC[C@@H](c2ccccc2)O1", "C[C@H]1CC[C@H](c2ccccc2)O1"
    assert murcko_scaffold(one) != murcko_scaffold(two)
    assert murcko_scaffold(one, chirality=False) == murcko_scaffold(two, chirality=False)
    with pytest.raises(MoleculeError, match="not SMILES"):
        murcko_scaffold("hello there")
