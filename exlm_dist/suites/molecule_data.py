"""A table of molecules: which rows can be used, their labels, splits by scaffolds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exlm_dist.finetuning.dataset import FailedRow
from exlm_dist.finetuning.ensemble import check_parts
from exlm_dist.finetuning.splits import Parts, random_split, scaffold_split
from exlm_dist.finetuning.targets import read_targets
from exlm_dist.suites.task_data import TaskData, check_used, hash_of_files, is_missing
from exlm_dist.tables.columns import listed
from exlm_dist.tables.records import InputOptions, Record, column_names, read_records
from exlm_dist.tokenizers.molecules import MoleculeError, canonical_smiles, make_policy, murcko_scaffold
from exlm_dist.utils.errors import DataError

if TYPE_CHECKING:
    from exlm_dist.suites.molecule_task import MoleculeTask

#: Fractions of the three parts, as all papers on MoleculeNet have them.
SIZES = (0.8, 0.1, 0.1)
#: The seed of the random split. Seeds of an evaluation are those of the training: the rows stay where they are.
SPLIT_SEED = 0


@dataclass(frozen=True, kw_only=True)
class MoleculeData(TaskData):
    """See `TaskData`: the parts are made here."""

    def split(self, name: str) -> Parts:
        """See `TaskData.split`: `scaffold` without stereo centres, as DeepChem's ScaffoldSplitter has it,
        `scaffold-chiral` with them, as Hu et al. (ICLR 2020) and those who follow them, or `random`."""
        texts = self.columns["smiles"]
        if name == "random":
            parts = random_split(len(texts), SIZES, SPLIT_SEED)
        else:
            chirality = name == "scaffold-chiral"
            parts = scaffold_split([murcko_scaffold(text, chirality=chirality) for text in texts], SIZES)
        remedy = f"Leave {name} out of --splits, or give {self.files[0]} more rows."
        check_parts(self.labels, self.targets, parts, test=True, remedy=remedy)
        return parts


def read_molecules(task: MoleculeTask, files: tuple[Path, ...]) -> MoleculeData:
    """The rows of the table of a task. DataError if a column is missing, or no row or less than half of them can be
    used."""
    (path,) = files
    names = column_names(path, InputOptions())
    column = _column(path, names, task.inputs)
    targets = task.targets or tuple(name for name in names if name not in (*task.inputs, *task.others))
    if missing := [name for name in targets if name not in names]:
        raise DataError(
            f"{path}: has no column {missing[0]!r}, whose values {task.name} is to predict. Its columns: "
            f"{listed(names)}. Take the file as MoleculeNet offers it, or correct the header."
        )
    used, keys, failed = _usable(read_records(path, InputOptions(column=column)), column, targets)
    check_used(path, len(used), failed, f"The column {column!r} must have molecules as SMILES, and each row a label.")
    columns = {name: [record.values[name] for record in used] for name in targets}
    defined = {name: values for name, values in columns.items() if _has_two(values)}
    if not defined:
        raise DataError(f"{path}: all labels are the same in each column of {task.name}: there is nothing to predict.")
    described, labels, _ = read_targets(defined, [f"{path}: row {record.row}" for record in used], task.kind)
    return MoleculeData(
        files=files,
        sha256=hash_of_files(files),
        columns={"smiles": [(record.values[column] or "").strip() for record in used]},
        keys=keys,
        places=[(record.file, record.row) for record in used],
        targets=tuple(described),
        labels=labels,
        undefined=tuple(name for name in targets if name not in defined),
        failed=failed,
    )


def _column(path: Path, names: Sequence[str], known: Sequence[str]) -> str:
    found = [name for name in names if name.lower() in known]
    if len(found) != 1:
        raise DataError(
            f"{path}: has {'no' if not found else 'more than one'} column of molecules ({' or '.join(known)}). Its "
            f"columns: {listed(names)}. Call the one with the molecules {known[0]!r}."
        )
    return found[0]


def _usable(
    records: Iterable[Record], column: str, targets: Sequence[str]
) -> tuple[list[Record], list[str], list[FailedRow]]:
    """(rows with a molecule and a label, their canonical SMILES, all other rows with the reason)."""
    policy = make_policy()
    used, keys, failed = [], [], []
    for record in records:
        try:
            if record.problem:
                raise MoleculeError(record.problem)
            key = canonical_smiles((record.values[column] or "").strip(), policy)
            if all(is_missing(record.values[name]) for name in targets):
                raise MoleculeError("no label")
        except MoleculeError as error:
            text = record.raw or record.values.get(column) or ""
            failed.append(FailedRow(record.file, record.row, str(error), text))
            continue
        used.append(record)
        keys.append(key)
    return used, keys, failed


def _has_two(values: Sequence[str | None]) -> bool:
    """Whether the labels of a column have two distinct values; 1 and 1.0 are the same."""
    known = {value.strip() for value in values if value is not None and not is_missing(value)}
    with suppress(ValueError):
        return len({float(value) for value in known}) > 1
    return len(known) > 1
