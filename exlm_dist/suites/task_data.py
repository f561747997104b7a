"""The data of a task: its file in the folder that the user has, the rows that can be used, their labels, the splits.

None of it depends on a checkpoint, so that all of them are judged on the same rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.finetuning.dataset import FailedRow
from exlm_dist.finetuning.ensemble import check_parts
from exlm_dist.finetuning.splits import PARTS, Parts, random_split, repeated_rows, scaffold_split, split_hash
from exlm_dist.finetuning.targets import Target, class_counts, read_targets
from exlm_dist.suites.suite import Task
from exlm_dist.tables.columns import kind_of, listed
from exlm_dist.tables.input_files import ENDINGS
from exlm_dist.tables.records import InputOptions, Record, column_names, read_records
from exlm_dist.tables.text_files import COMPRESSED
from exlm_dist.tokenizers.molecules import MoleculeError, canonical_smiles, make_policy, murcko_scaffold
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.files import sha256_file

#: Fractions of the three parts, as all papers on MoleculeNet have them.
SIZES = (0.8, 0.1, 0.1)
#: The seed of the random split. Seeds of an evaluation are those of the training: the rows stay where they are.
SPLIT_SEED = 0
#: Folders below that of the data in which files are looked for: `tox21/raw/tox21.csv` is one form of download.
DEEPEST = 3


@dataclass(frozen=True)
class TaskData:
    """The used rows of a task: n rows with at least one label.

    Args:
        texts: molecules as they are in the file, [n]. keys: equal for two spellings of the same molecule, [n].
        rows: number of each row in the file, [n]. labels: float64 [n, targets], NaN: missing.
        undefined: columns of labels that have no two distinct ones, which are left out.
    """

    path: Path
    sha256: str
    texts: list[str]
    keys: list[str]
    rows: list[int]
    targets: tuple[Target, ...]
    labels: np.ndarray
    undefined: tuple[str, ...]
    failed: list[FailedRow]

    def described(self) -> dict[str, Any]:
        """What is recorded of it, as JSON has it."""
        return {
            "file": str(self.path),
            "sha256": self.sha256,
            "rows": {"read": len(self.rows) + len(self.failed), "used": len(self.rows)},
            "failed": [{"row": one.row, "reason": one.reason, "text": one.text} for one in self.failed],
            "duplicates": sum(count - 1 for count in Counter(self.keys).values()),
            "targets": [target.name for target in self.targets],
            "undefined_targets": list(self.undefined),
        }


def find_file(task: Task, folder: Path) -> Path | None:
    """The file of a task in or below the folder; None if it is not there. DataError if several files could be it."""
    names = {f"{name}{ending}{packed}" for name in task.files for ending in ENDINGS for packed in ("", *COMPRESSED)}
    depths = ["/".join(["*"] * depth) for depth in range(1, DEEPEST + 1)]
    found = [path for depth in depths for path in sorted(folder.glob(depth)) if path.name.lower() in names]
    if len(found) > 1:
        raise DataError(
            f"{task.name}: {listed([str(path) for path in found])} could each be its file. Leave one in {folder}."
        )
    return found[0] if found else None


def read_task(task: Task, path: Path) -> TaskData:
    """Read the file of a task. DataError if a column is missing, or no row or less than half of them can be used."""
    names = column_names(path, InputOptions())
    column = _column(path, names, task.inputs)
    targets = task.targets or tuple(name for name in names if name not in (*task.inputs, *task.others))
    if missing := [name for name in targets if name not in names]:
        raise DataError(
            f"{path}: has no column {missing[0]!r}, whose values {task.name} is to predict. Its columns: "
            f"{listed(names)}. Take the file as MoleculeNet offers it, or correct the header."
        )
    records = list(read_records(path, InputOptions(column=column)))
    used, keys, failed = _usable(records, column, targets)
    if not used or len(used) < len(records) / 2:
        first = f" (the first: row {failed[0].row}: {failed[0].reason})" if failed else ""
        raise DataError(
            f"{path}: {len(records) - len(used)} of {len(records)} rows cannot be used{first}. The column {column!r} "
            "must have molecules as SMILES, and each row a label."
        )
    columns = {name: [record.values[name] for record in used] for name in targets}
    defined = {name: values for name, values in columns.items() if _has_two(values)}
    if not defined:
        raise DataError(f"{path}: all labels are the same in each column of {task.name}: there is nothing to predict.")
    described, labels, _ = read_targets(defined, [f"{path}: row {record.row}" for record in used], task.kind)
    return TaskData(
        path,
        sha256_file(path),
        [(record.values[column] or "").strip() for record in used],
        keys,
        [record.row for record in used],
        tuple(described),
        labels,
        tuple(name for name in targets if name not in defined),
        failed,
    )


def split_task(data: TaskData, split: str) -> Parts:
    """The rows of each part: `scaffold` without stereo centres, as DeepChem's ScaffoldSplitter has it,
    `scaffold-chiral` with them, as Hu et al. (ICLR 2020) and those who follow them, or `random`. DataError if nothing
    can be learned from a part, or measured on it."""
    if split == "random":
        parts = random_split(len(data.rows), SIZES, SPLIT_SEED)
    else:
        chirality = split == "scaffold-chiral"
        parts = scaffold_split([murcko_scaffold(text, chirality=chirality) for text in data.texts], SIZES)
    remedy = f"Leave {split} out of --splits, or give {data.path} more rows."
    check_parts(data.labels, data.targets, parts, test=True, remedy=remedy)
    return parts


def described_split(data: TaskData, parts: Parts) -> dict[str, Any]:
    """What is recorded of a split: its hash, rows and labels of each part, and molecules that parts have in common."""
    counts = {
        part: {target.name: class_counts(target, data.labels[rows, n]) for n, target in enumerate(data.targets)}
        for part, rows in parts.items()
    }
    return {
        "hash": split_hash(parts),
        "sizes": {part: len(parts[part]) for part in PARTS},
        "counts": counts,
        "repeated": repeated_rows(data.keys, parts),
    }


def _column(path: Path, names: Sequence[str], known: Sequence[str]) -> str:
    found = [name for name in names if name.lower() in known]
    if len(found) != 1:
        raise DataError(
            f"{path}: has {'no' if not found else 'more than one'} column of molecules ({' or '.join(known)}). Its "
            f"columns: {listed(names)}. Call the one with the molecules {known[0]!r}."
        )
    return found[0]


def _usable(
    records: Sequence[Record], column: str, targets: Sequence[str]
) -> tuple[list[Record], list[str], list[FailedRow]]:
    """(rows with a molecule and a label, their canonical SMILES, all other rows with the reason)."""
    policy = make_policy()
    used, keys, failed = [], [], []
    for record in records:
        try:
            if record.problem:
                raise MoleculeError(record.problem)
            key = canonical_smiles((record.values[column] or "").strip(), policy)
            if all(_is_missing(record.values[name]) for name in targets):
                raise MoleculeError("no label")
        except MoleculeError as error:
            text = record.raw or record.values.get(column) or ""
            failed.append(FailedRow(record.file, record.row, str(error), text))
            continue
        used.append(record)
        keys.append(key)
    return used, keys, failed


def _is_missing(value: str | None) -> bool:
    return value is None or kind_of(value) == "missing"


def _has_two(values: Sequence[str | None]) -> bool:
    """Whether the labels of a column have two distinct values; 1 and 1.0 are the same."""
    known = {value.strip() for value in values if value is not None and not _is_missing(value)}
    with suppress(ValueError):
        return len({float(value) for value in known}) > 1
    return len(known) > 1
