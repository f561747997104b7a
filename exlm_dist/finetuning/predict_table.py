"""`exlm predict`: a table in, the same table with predictions out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from exlm_dist.finetuning.dataset import ANY_INPUT
from exlm_dist.finetuning.prediction import FinetunedModel, load_finetuned
from exlm_dist.finetuning.result_tables import output_names
from exlm_dist.tables.columns import choose_column
from exlm_dist.tables.failed_rows import FailedRows, failed_rows_path
from exlm_dist.tables.records import InputOptions, Record, column_names, expand_inputs, read_records
from exlm_dist.tables.table_writer import TableWriter
from exlm_dist.utils.errors import ConfigError, DataError

ROWS_AT_ONCE = 4096


def predict_table(
    model: Path | str,
    data: Sequence[str],
    out: Path | str,
    *,
    inputs: Sequence[str] = (),
    options: InputOptions = ANY_INPUT,
    overwrite: bool = False,
    device: str = "auto",
) -> str:
    """Write the rows of `data`, in their order and with all their columns, with predictions to the table `out`. Rows
    that failed have none, and are listed in `out`.failed.tsv. `inputs`: the columns to read, by default those of the
    training data. Returns what is to be said. DataError if a column is missing or all rows failed."""
    out = Path(out)
    writer = TableWriter(out, overwrite)
    finetuned = load_finetuned(model, device)
    names = list(inputs) or list(finetuned.inputs)
    if len(names) != len(finetuned.inputs):
        raise ConfigError(f"the model reads {len(finetuned.inputs)} columns; --column names {len(names)}.")
    reading = InputOptions(names[0], options.format, options.delimiter, options.header)
    paths = expand_inputs(data, reading)
    found = _check_columns(paths, reading, names, finetuned)
    count = 0
    with writer as table, FailedRows(failed_rows_path(out)) as failed:
        records = (record for path in paths for record in read_records(path, reading))
        for chunk in _chunks(records):
            columns = {name: [record.values.get(name) for record in chunk] for name in found}
            texts = [[None if r.problem else r.values.get(name) for r in chunk] for name in _resolved(names, found)]
            predictions = finetuned.predict_rows(texts)
            for row, reason in predictions.failures.items():
                record = chunk[row]
                failed.add(record.file, record.row, record.problem or reason, record.raw or str(texts[0][row] or ""))
            table.write({**columns, **predictions.columns()})
            count += len(chunk)
        if failed.count == count:
            raise DataError(
                f"none of the {count} rows can be read in the column {' and '.join(map(repr, names))}: name the one "
                "that the model reads with --column."
            )
    beside = f", {failed.count} failed (reasons: {failed.path})" if failed.count else ""
    return f"{out}: {count} rows{beside}"


def _check_columns(
    paths: Sequence[Path], reading: InputOptions, names: Sequence[str], model: FinetunedModel
) -> list[str]:
    """Columns that all files have. DataError if one of the model's inputs is missing, files differ, or have columns
    with the names of predictions."""
    first = column_names(paths[0], reading)
    for path in paths:
        found = column_names(path, reading)
        if found != first:
            raise DataError(
                f"{path}: its columns are {found}, but those of {paths[0]} are {first}. Predict one by one."
            )
        for name in names:
            choose_column(path, found, name)
        clash = sorted({*found} & {*output_names(model.targets)})
        if clash:
            raise DataError(f"{path}: has a column {clash[0]!r} already, which predictions are to have. Rename it.")
    return first


def _resolved(names: Sequence[str], found: Sequence[str]) -> list[str]:
    """Columns by name or by number from 1, by their names."""
    return [choose_column(Path(), found, name) for name in names]


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    while chunk := list(islice(records, ROWS_AT_ONCE)):
        yield chunk
