"""`exlm fill`: completions as text for a terminal, and as a table for the rows of a file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exlm_dist.inference.fill import Completion, Filled, FillSettings, fill_texts
from exlm_dist.inference.input_rows import InputRows
from exlm_dist.inference.loading import LoadedCheckpoint
from exlm_dist.tables.failed_rows import FailedRows, failed_rows_path
from exlm_dist.tables.records import InputOptions
from exlm_dist.tables.table_writer import TableWriter
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.outputs import user_path
from exlm_dist.utils.progress import Progress

#: Columns that the table has beside those of the input: of every model, of molecules, and with `marginal`.
COLUMNS = ("rank", "completion", "probability", "log_probability")
OF_MOLECULES = ("valid", "canonical")
OF_MARGINALS = ("independent", "independent_log_probability", "marginals")
#: What they hold for a row that cannot be filled.
_EMPTY: dict[str, Any] = {
    **dict.fromkeys((*COLUMNS, *OF_MOLECULES, *OF_MARGINALS)),
    **dict.fromkeys(("probability", "log_probability", "independent_log_probability"), math.nan),
    "rank": 1,
}
#: Rows that are filled and written at a time.
CHUNK = 256


def described(filled: Filled, *, marginal: bool, sampled: bool) -> str:
    """The completions of one text as lines; with `marginal` also each mask by itself."""
    molecules = filled.completions[0].valid is not None
    rows = [("drawn" if sampled else "rank", "probability", *(["molecule"] if molecules else []), "completion")]
    rows += [(str(rank), *_cells(one)) for rank, one in enumerate(filled.completions, 1)]
    if marginal:
        rows.append(("independent", *_cells(filled.independent)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = [filled.text]
    lines += ["  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]) for row in rows]
    if marginal:
        lines.append("  each mask by itself:")
        for number, likely in enumerate(filled.marginals, 1):
            lines.append(f"    mask {number}: " + ", ".join(f"{token} {p:.3f}" for token, p in likely))
    return "\n".join(lines)


def _cells(one: Completion) -> tuple[str, ...]:
    molecule = [] if one.valid is None else ["yes" if one.valid else "no"]
    return (f"{one.probability:.4g}", *molecule, one.text)


def fill_file(
    loaded: LoadedCheckpoint,
    inputs: Sequence[str],
    out: Path,
    *,
    options: InputOptions,
    settings: FillSettings,
    marginal: bool = False,
    overwrite: bool = False,
) -> str:
    """Fill the rows of `inputs` (paths and patterns) into the table `out`; a line that says what was done.

    A row of the output for each completion: the columns of the input, then `COLUMNS`, for molecules `OF_MOLECULES`, and
    with `marginal` `OF_MARGINALS`. A row that cannot be filled has one, with nulls, and is listed beside `out` with the
    reason. ConfigError for options or columns that do not fit, DataError if no row can be filled; nothing is written
    then.
    """
    domain = loaded.tokenizer.domain
    names = COLUMNS + OF_MOLECULES * (domain == "smiles") + OF_MARGINALS * marginal
    source = InputRows(inputs, options, domain, added=names)
    rows, reason = 0, ""
    with (
        TableWriter(user_path(out), overwrite) as table,
        FailedRows(failed_rows_path(user_path(out))) as failed,
        Progress("filling", "rows") as progress,
    ):
        for records in source.chunks(CHUNK):
            results = fill_texts(loaded, [source.text(record) for record in records], settings, first=rows)
            owners, found = [], []
            for record, result in zip(records, results):
                if isinstance(result, str):
                    why = record.problem or result
                    reason = reason or f"{record.file} row {record.row}: {why}"
                    failed.add(record.file, record.row, why, source.shown(record))
                lines = [_EMPTY] if isinstance(result, str) else _lines(result)
                owners += [record] * len(lines)
                found += lines
            table.write({**source.columns(owners), **{name: [line[name] for line in found] for name in names}})
            rows += len(records)
            progress.update(len(records))
        if rows == failed.count:
            raise DataError(source.none_usable(rows, reason))
    listed = f"; {failed.count:,} failed, listed in {failed.path} (first: {reason})" if failed.count else ""
    return f"{out}: {rows - failed.count:,} of {rows:,} rows filled{listed}"


def _lines(filled: Filled) -> list[dict[str, Any]]:
    """The columns of each completion, by name."""
    single = filled.independent
    by_mask = {
        "independent": single.text,
        "independent_log_probability": single.log_probability,
        "marginals": json.dumps(filled.marginals, ensure_ascii=False),
    }
    return [
        {
            "rank": rank,
            "completion": one.text,
            "probability": one.probability,
            "log_probability": one.log_probability,
            "valid": None if one.valid is None else "yes" if one.valid else "no",
            "canonical": one.canonical,
            **by_mask,
        }
        for rank, one in enumerate(filled.completions, 1)
    ]
