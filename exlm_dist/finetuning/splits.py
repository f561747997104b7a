"""Training, validation and test part of a table: by scaffolds, at random, or as a column says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exlm_dist.data.counter_rng import hash_of
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.files import fingerprint_of

PARTS = ("train", "valid", "test")
#: What columns call the parts, in lower case.
NAMES = {"train": 0, "training": 0, "valid": 1, "val": 1, "validation": 1, "dev": 1, "test": 2}

#: Indices of the rows of each part, ascending.
Parts = dict[str, np.ndarray]


def scaffold_split(scaffolds: Sequence[str], sizes: tuple[float, float, float]) -> Parts:
    """Rows with the same scaffold go into the same part; the largest groups into the training part.

    Groups are sorted by (size, first row), descending. Each goes whole into the first part that has room for it, the
    last one takes the rest, as DeepChem's ScaffoldSplitter does it for MoleculeNet.
    """
    groups: dict[str, list[int]] = {}
    for row, scaffold in enumerate(scaffolds):
        groups.setdefault(scaffold, []).append(row)
    train_room = sizes[0] * len(scaffolds)
    both_room = (sizes[0] + sizes[1]) * len(scaffolds)
    train: list[int] = []
    valid: list[int] = []
    test: list[int] = []
    for group in sorted(groups.values(), key=lambda rows: (len(rows), rows[0]), reverse=True):
        if len(train) + len(group) <= train_room:
            train += group
        elif len(train) + len(valid) + len(group) <= both_room:
            valid += group
        else:
            test += group
    return _sorted(train, valid, test)


def random_split(count: int, sizes: tuple[float, float, float], seed: int) -> Parts:
    """Rows in an order that depends on `seed` and their number alone, cut into parts of the given sizes."""
    order = np.argsort(hash_of(seed, np.arange(count)), kind="stable")
    train, both = round(sizes[0] * count), round((sizes[0] + sizes[1]) * count)
    return _sorted(order[:train], order[train:both], order[both:])


def column_split(values: Sequence[str | None], places: Sequence[str], column: str) -> Parts:
    """Rows by what the column says: train, valid (val, dev, validation) or test, in upper or lower case. `places`:
    where each row is. DataError for any other value."""
    parts: list[list[int]] = [[], [], []]
    for row, value in enumerate(values):
        part = NAMES.get((value or "").strip().lower())
        if part is None:
            raise DataError(
                f"{places[row]}: the column {column!r} of the split is {value!r}; it must be one of {', '.join(NAMES)}."
            )
        parts[part].append(row)
    return _sorted(*parts)


def split_hash(parts: Parts) -> str:
    """SHA-256 of the rows of each part."""
    return fingerprint_of({name: rows.tolist() for name, rows in parts.items()})


def repeated_rows(keys: Sequence[str], parts: Parts) -> dict[str, int]:
    """How many rows of each part but the first have an input (`keys`) that an earlier part has too."""
    first, *others = parts
    seen = {keys[row] for row in parts[first]}
    repeated = {}
    for part in others:
        own = [keys[row] for row in parts[part]]
        repeated[part] = sum(key in seen for key in own)
        seen.update(own)
    return repeated


def _sorted(*parts: Sequence[int] | np.ndarray) -> Parts:
    return {name: np.sort(np.array(rows, np.int64)) for name, rows in zip(PARTS, parts)}
