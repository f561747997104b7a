"""The table that a model is fine-tuned on: encoded inputs, labels, and which rows cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from exlm_dist.finetuning.finetune_settings import SplitSettings
from exlm_dist.finetuning.inputs import encode_inputs
from exlm_dist.finetuning.splits import Parts, column_split, random_split, scaffold_split
from exlm_dist.finetuning.targets import Target, read_targets
from exlm_dist.inference.sequences import take_sequences
from exlm_dist.tables.columns import choose_column, listed
from exlm_dist.tables.records import InputOptions, Record, column_names, expand_inputs, read_records, text_column
from exlm_dist.tokenizers import Tokenizer
from exlm_dist.tokenizers.encoding import normalised
from exlm_dist.utils.errors import ConfigError, DataError

#: Files as their names and contents show them.
ANY_INPUT = InputOptions()


@dataclass(frozen=True)
class Examples:
    """m encoded rows with their labels."""

    tokens: np.ndarray  # int32 [sum of lengths], without BOS and EOS
    lengths: np.ndarray  # int64 [m]
    labels: np.ndarray  # float64 [m, targets], NaN: missing
    features: np.ndarray | None = None  # float32 [m, D], what an encoder that does not learn makes of each row
    ids: np.ndarray | None = None  # int64 [m], by which a criterion knows what else belongs to each row

    def take(self, chosen: np.ndarray) -> Examples:
        """The rows `chosen`, in that order."""
        features, ids = (None if one is None else one[chosen] for one in (self.features, self.ids))
        return Examples(*take_sequences(self.tokens, self.lengths, chosen), self.labels[chosen], features, ids)

    def __len__(self) -> int:
        return len(self.lengths)


class Columns(NamedTuple):
    """Names of the columns that are read: of texts, of labels, and the one that says the part."""

    inputs: list[str]
    targets: list[str]
    split: str | None


class FailedRow(NamedTuple):
    """A row that cannot be used, and why."""

    file: str
    row: int
    reason: str
    text: str


@dataclass(frozen=True)
class Dataset:
    """The used rows of a table: m examples, where each is from, and what else was read."""

    examples: Examples
    inputs: tuple[str, ...]  # names of the one or two columns of texts
    texts: list[list[str]]  # of each of these columns, [m]
    places: list[tuple[str, int]]  # file and row, [m]
    targets: list[Target]
    split_values: list[str | None] | None  # of the column that says the part, [m]
    failed: list[FailedRow]
    unknown: int  # rows with a token that the vocabulary lacks
    truncated: int  # rows of which the end was cut off
    remarks: list[str] = field(default_factory=list)

    @property
    def read(self) -> int:
        """Rows in the files."""
        return len(self.places) + len(self.failed)


def read_dataset(
    data: Sequence[str],
    targets: Sequence[str],
    tokenizer: Tokenizer,
    *,
    inputs: Sequence[str] = (),
    options: InputOptions = ANY_INPUT,
    task: str | None = None,
    split_column: str | None = None,
    max_tokens: int,
    truncate: bool = False,
) -> Dataset:
    """Read files or patterns. `inputs`: the column of texts or the two of pairs; by default `smiles` or `text`, as the
    tokenizer has it. DataError if a column is missing, no row or less than half of them can be used, or labels do not
    fit; rows without a label, or whose text cannot be encoded, are in `failed`."""
    columns, records = _read(data, targets, tokenizer, inputs, options, split_column)
    names = columns.inputs
    failed = [_failed(record, record.problem) for record in records if record.problem]
    good = [record for record in records if not record.problem]
    texts = [[record.values.get(name) for record in good] for name in names]
    encoded = encode_inputs(tokenizer, texts, max_tokens=max_tokens, truncate=truncate)
    failed += [_failed(good[row], reason) for row, reason in encoded.failures.items()]
    _check_readable(tokenizer, names, len(records), len(encoded.rows), failed)
    used = [good[row] for row in encoded.rows]
    values = {target: [record.values.get(target) for record in used] for target in columns.targets}
    described, labels, remarks = read_targets(values, [f"{r.file}: row {r.row}" for r in used], task)
    labelled = np.flatnonzero(~np.isnan(labels).all(axis=1))
    failed += [_failed(used[row], "no label") for row in np.flatnonzero(np.isnan(labels).all(axis=1))]
    kept = [used[row] for row in labelled]
    return Dataset(
        Examples(encoded.tokens, encoded.lengths, labels).take(labelled),
        tuple(names),
        [[record.values.get(name) or "" for record in kept] for name in names],
        [(record.file, record.row) for record in kept],
        described,
        None if columns.split is None else [record.values.get(columns.split) for record in kept],
        sorted(failed),
        encoded.unknown,
        encoded.truncated,
        remarks,
    )


def split_dataset(dataset: Dataset, settings: SplitSettings, tokenizer: Tokenizer) -> Parts:
    """The rows of each part. A scaffold is that of the (first) molecule as it is in the table. ConfigError for a
    scaffold split of texts."""
    kind = settings.kind or ("scaffold" if tokenizer.domain == "smiles" else "random")
    if kind == "column":
        assert dataset.split_values is not None and settings.column is not None
        places = [f"{file}: row {row}" for file, row in dataset.places]
        return column_split(dataset.split_values, places, settings.column)
    if kind == "random":
        return random_split(len(dataset.places), settings.sizes, settings.seed)
    if tokenizer.domain != "smiles":
        raise ConfigError("a scaffold split needs molecules, but the checkpoint reads text: say --split random.")
    from exlm_dist.tokenizers.molecules import murcko_scaffold

    scaffolds = [murcko_scaffold(text.strip(), chirality=settings.chirality) for text in dataset.texts[0]]
    return scaffold_split(scaffolds, settings.sizes)


def canonical_keys(dataset: Dataset, tokenizer: Tokenizer) -> list[str]:
    """What the tokenizer reads of each row; equal for two spellings of the same molecule."""
    return ["\0".join(normalised(tokenizer, text) for text in row) for row in zip(*dataset.texts)]


def input_columns(path: Path, options: InputOptions, inputs: Sequence[str], default: str) -> list[str]:
    """Names in a file of the columns of texts `inputs`; by default of the one that is called `default`, or the only
    one. DataError if one is missing."""
    first = text_column(path, replace(options, column=inputs[0] if inputs else None), default)
    found = column_names(path, replace(options, column=first))
    return [first, *(choose_column(path, found, name) for name in inputs[1:])]


def _read(
    data: Sequence[str],
    targets: Sequence[str],
    tokenizer: Tokenizer,
    inputs: Sequence[str],
    options: InputOptions,
    split_column: str | None,
) -> tuple[Columns, list[Record]]:
    """What is read, and all records of all files."""
    if len(set(targets)) != len(targets) or not targets:
        raise ConfigError(f"--target must name columns, each once: {' '.join(targets) or 'none given'}.")
    if len(inputs) > 2:
        raise ConfigError(f"--column names {len(inputs)} columns; it must be one, or two for pairs of texts.")
    records: list[Record] = []
    columns: Columns | None = None
    for path in expand_inputs(data, options):
        names = input_columns(path, options, inputs, tokenizer.domain)
        reading = replace(options, column=names[0])
        found = column_names(path, reading)
        labels = [choose_column(path, found, name) for name in targets]
        split = None if split_column is None else choose_column(path, found, split_column)
        for name in [*labels, split]:
            if name in names:
                raise ConfigError(f"{path}: the column {name!r} is an input; it cannot be a target or say the split.")
        own = Columns(names, labels, split)
        if columns is not None and columns != own:
            raise DataError(
                f"{path}: its columns are {_listed(own)}, but those of the files before are {_listed(columns)}. Name "
                "them alike."
            )
        columns = own
        records += read_records(path, reading)
    assert columns is not None, "there is a file"
    return columns, records


def _listed(columns: Columns) -> str:
    return listed([*columns.inputs, *columns.targets, *([columns.split] if columns.split else [])])


def _failed(record: Record, reason: str) -> FailedRow:
    text = record.raw or "\t".join(value or "" for value in record.values.values())
    return FailedRow(record.file, record.row, reason, text)


def _check_readable(
    tokenizer: Tokenizer, names: Sequence[str], read: int, usable: int, failed: Sequence[FailedRow]
) -> None:
    """DataError if no row or less than half of them can be read, which says what most of them lack."""
    if usable and usable >= read / 2:
        return
    if not read:
        raise DataError("there is no row in the data.")
    kind = "molecules as SMILES" if tokenizer.domain == "smiles" else "text"
    raise DataError(
        f"{read - usable} of {read} rows cannot be read in the column {' and '.join(map(repr, names))} (the first: "
        f"{failed[0].file} row {failed[0].row}: {failed[0].reason}). The checkpoint reads {kind}: name the column that "
        "has it with --column, or take a checkpoint of another kind. Long texts are cut with --truncate."
    )
