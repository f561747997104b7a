"""`exlm predict`: a table in, the same table with predictions out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from exlm_dist.finetuning.dataset import ANY_INPUT, input_columns
from exlm_dist.finetuning.prediction import FinetunedModel, load_finetuned
from exlm_dist.finetuning.result_tables import output_names
from exlm_dist.tables.failed_rows import FailedRows, failed_rows_path
from exlm_dist.tables.records import InputOptions, Record, column_names, expand_inputs, read_records
from exlm_dist.tables.table_writer import TableWriter
from exlm_dist.utils.errors import ConfigError, DataError
from exlm_dist.utils.outputs import user_path
from exlm_dist.utils.progress import Progress

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
    out = user_path(out)
    writer = TableWriter(out, overwrite)
    finetuned = load_finetuned(model, device)
    names = list(inputs) or list(finetuned.inputs)
    if len(names) != len(finetuned.inputs):
        raise ConfigError(f"the model reads {len(finetuned.inputs)} columns; --column names {len(names)}.")
    paths = expand_inputs(data, options)
    chosen = {str(path): input_columns(path, options, names, names[0]) for path in paths}
    found = _check_columns(paths, options, chosen, finetuned)
    count = 0
    with writer as table, FailedRows(failed_rows_path(out)) as failed, Progress("predicting", "rows") as progress:
        for chunk in _chunks(paths, options, chosen):
            texts = [
                [None if record.problem else record.values.get(chosen[record.file][side]) for record in chunk]
                for side in range(len(names))
            ]
            predictions = finetuned.predict_rows(texts)
            for row, reason in sorted(predictions.failures.items()):
                record, text = chunk[row], "\t".join(column[row] or "" for column in texts)
                failed.add(record.file, record.row, record.problem or reason, record.raw or text)
            columns = {name: [record.values.get(name) for record in chunk] for name in found}
            table.write({**columns, **predictions.columns()})
            count += len(chunk)
            progress.update(len(chunk))
        if not count:
            raise DataError("there is no row in the data.")
        if failed.count == count:
            raise DataError(
                f"none of the {count} rows can be read in the column {' and '.join(map(repr, chosen[str(paths[0])]))}: "
                "name the one that the model reads with --column."
            )
    beside = f", {failed.count} failed (reasons: {failed.path})" if failed.count else ""
    return f"{out}: {count} rows{beside}"


def _check_columns(
    paths: Sequence[Path], options: InputOptions, chosen: dict[str, list[str]], model: FinetunedModel
) -> list[str]:
    """Columns that all files have. DataError if they differ, or have names that predictions are to have."""
    named = [column_names(path, replace(options, column=chosen[str(path)][0])) for path in paths]
    for path, found in zip(paths, named):
        if found != named[0]:
            raise DataError(f"{path} has the columns {found}, but {paths[0]} has {named[0]}: predict them one by one.")
        if clash := sorted({*found} & {*output_names(model.targets)}):
            raise DataError(f"{path} has a column {clash[0]!r} already, and so will the output. Rename or drop it.")
    return named[0]


def _chunks(paths: Sequence[Path], options: InputOptions, chosen: dict[str, list[str]]) -> Iterator[list[Record]]:
    records = (record for path in paths for record in read_records(path, replace(options, column=chosen[str(path)][0])))
    while chunk := list(islice(records, ROWS_AT_ONCE)):
        yield chunk
