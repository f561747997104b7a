"""Tasks whose data is one table of molecules, divided up by scaffolds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from exlm_dist.finetuning.dataset import FailedRow
from exlm_dist.finetuning.ensemble import check_parts
from exlm_dist.finetuning.splits import Parts, random_split, scaffold_split
from exlm_dist.finetuning.targets import read_targets
from exlm_dist.suites.suite import Task
from exlm_dist.suites.task_data import TaskData, check_used, hash_of_files, is_missing
from exlm_dist.tables.columns import listed
from exlm_dist.tables.input_files import ENDINGS
from exlm_dist.tables.records import InputOptions, Record, column_names, read_records
from exlm_dist.tables.text_files import COMPRESSED
from exlm_dist.tokenizers.molecules import MoleculeError, canonical_smiles, make_policy, murcko_scaffold
from exlm_dist.utils.errors import DataError

#: Fractions of the three parts, as all papers on MoleculeNet have them.
SIZES = (0.8, 0.1, 0.1)
#: The seed of the random split. Seeds of an evaluation are those of the training: the rows stay where they are.
SPLIT_SEED = 0
#: Folders below that of the data in which files are looked for: `tox21/raw/tox21.csv` is one form of download.
DEEPEST = 3


@dataclass(frozen=True, kw_only=True)
class MoleculeTask(Task):
    """See `Task`.

    Args:
        files: names that its file is known under, in lower case and without endings.
        inputs: names that its column of molecules is known under.
        targets: its columns of labels; empty: all that are neither inputs nor `others`.
        others: columns that are no labels, where `targets` does not name the labels.
    """

    files: tuple[str, ...]
    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    others: tuple[str, ...]

    def find(self, folder: Path) -> dict[str, Path | None]:
        """See `Task.find`."""
        names = {f"{name}{ending}{packed}" for name in self.files for ending in ENDINGS for packed in ("", *COMPRESSED)}
        found = [path for path in files_below(folder, DEEPEST) if path.name.lower() in names]
        refuse_several(self.name, found, folder)
        return {" or ".join(f"{name}.csv" for name in self.files): found[0] if found else None}

    def read(self, files: tuple[Path, ...]) -> MoleculeData:
        """See `Task.read`: also DataError if a column is missing, or no row or less than half of them can be used."""
        (path,) = files
        names = column_names(path, InputOptions())
        column = _column(path, names, self.inputs)
        targets = self.targets or tuple(name for name in names if name not in (*self.inputs, *self.others))
        if missing := [name for name in targets if name not in names]:
            raise DataError(
                f"{path}: has no column {missing[0]!r}, whose values {self.name} is to predict. Its columns: "
                f"{listed(names)}. Take the file as MoleculeNet offers it, or correct the header."
            )
        used, keys, failed = _usable(read_records(path, InputOptions(column=column)), column, targets)
        check_used(
            path, len(used), failed, f"The column {column!r} must have molecules as SMILES, and each row a label."
        )
        columns = {name: [record.values[name] for record in used] for name in targets}
        defined = {name: values for name, values in columns.items() if _has_two(values)}
        if not defined:
            raise DataError(
                f"{path}: all labels are the same in each column of {self.name}: there is nothing to predict."
            )
        described, labels, _ = read_targets(defined, [f"{path}: row {record.row}" for record in used], self.kind)
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


def files_below(folder: Path, deepest: int) -> list[Path]:
    """What is in a folder and up to so many levels below it, sorted within each level."""
    depths = ["/".join(["*"] * depth) for depth in range(1, deepest + 1)]
    return [path for depth in depths for path in sorted(folder.glob(depth))]


def refuse_several(name: str, found: Sequence[Path], folder: Path) -> None:
    """DataError if several files could be that of a task."""
    if len(found) > 1:
        raise DataError(
            f"{name}: {listed([str(path) for path in found])} could each be its file. Leave one in {folder}."
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
