"""Input files to records: csv, tsv, txt, smi, jsonl, parquet; compressed; many files and patterns.

options = InputOptions(column="smiles")
for path in expand_inputs(["data/*.csv.gz"], options):
    for record in read_records(path, options):
        ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol, TextIO

from exlm_dist.tables.columns import choose_column, listed
from exlm_dist.tables.delimited import DelimitedTable
from exlm_dist.tables.input_files import InputOptions, expand_inputs, resolved
from exlm_dist.tables.json_lines import JsonLines
from exlm_dist.tables.parquet_table import open_parquet
from exlm_dist.tables.text_files import open_text
from exlm_dist.utils.errors import DataError

__all__ = [
    "InputOptions",
    "Record",
    "Row",
    "column_names",
    "expand_inputs",
    "read_records",
    "read_rows",
    "resolved",
    "text_column",
    "text_problem",
]


class Row(NamedTuple):
    """One input text and its position: data row (csv, tsv, parquet) or line (other formats), counted from 1."""

    file: str
    row: int
    text: str
    problem: str = ""  # why the row cannot be used, if reading it showed that; text is then the row as it is


class Record(NamedTuple):
    """All values of one input row and its position, counted as in `Row`."""

    file: str
    row: int
    values: dict[str, str | None]  # by name of the column, in the order of the file; None: missing
    problem: str = ""  # why the row cannot be used, if reading it showed that
    raw: str = ""  # with a problem: the row as it stands in the file, if it could not be split into values


class Table(Protocol):
    """An open file: the names of its columns, and its rows, once. not_text: what columns hold that have no text."""

    names: list[str]
    not_text: dict[str, str]

    def texts(self, column: str) -> Iterator[tuple[int, str | None, str]]:
        """(number, text, problem) of each row; with a problem, the text is the row itself."""

    def records(self, text: str | None) -> Iterator[tuple[int, dict[str, str | None], str, str]]:
        """(number, values, problem, raw) of each row. `text`: the column without which a row cannot be used."""


def read_records(path: Path, options: InputOptions) -> Iterator[Record]:
    """All columns of the rows of one file. A row has a problem if it is not well-formed, or if there is no text in
    `options.column`, where that is given. DataError for a wrong column and a damaged file, and if the form of the file
    is not certain."""
    name = str(path)
    with _open_table(path, options) as table:
        column = None if options.column is None else _chosen(path, table, options.column, "")
        for number, values, problem, raw in table.records(column):
            if column is not None and not problem:
                problem = text_problem(values[column] or "")
            yield Record(name, number, values, problem, raw)


def read_rows(path: Path, options: InputOptions, default_column: str) -> Iterator[Row]:
    """The text of the rows of one file, of csv, tsv, jsonl and parquet in the column that `text_column` names, in txt
    files each line, in smi files the first word of each line that is neither blank nor the header. Errors as in
    `read_records`."""
    name = str(path)
    with _open_table(path, options) as table:
        column = _chosen(path, table, options.column, default_column)
        for number, text, problem in table.texts(column):
            yield Row(name, number, text or "", problem or text_problem(text or ""))


def column_names(path: Path, options: InputOptions) -> list[str]:
    """Names of the columns of one file; 'text' for txt, 'smiles' for smi, numbers from 1 for csv without a header."""
    with _open_table(path, options) as table:
        return list(table.names)


def text_column(path: Path, options: InputOptions, default: str) -> str:
    """Name of the column to read: `options.column`, or the only one, or `default` in upper or lower case. DataError for
    a wrong one lists the columns and suggests a similar one."""
    with _open_table(path, options) as table:
        return _chosen(path, table, options.column, default)


def text_problem(text: str) -> str:
    """Why a text cannot be used: 'NUL character', or 'not UTF-8' (undecodable bytes are passed on as surrogates)."""
    if "\0" in text:
        return "NUL character"
    if text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text):
        return ""
    return "not UTF-8"


def _chosen(path: Path, table: Table, asked: str | None, default: str) -> str:
    """The column to read; txt and smi files have but one, which has no name of its own."""
    if isinstance(table, _Lines):
        return table.names[0]
    column = choose_column(path, table.names, asked, default)
    if column in table.not_text:
        raise DataError(
            f"{path}: column {column!r} holds {table.not_text[column]}, not text. Its columns: {listed(table.names)}."
        )
    return column


@contextmanager
def _open_table(path: Path, options: InputOptions) -> Iterator[Table]:
    options = resolved(path, options)
    if options.format == "parquet":
        with open_parquet(path) as table:
            yield table
        return
    with open_text(path) as file:
        if options.format in ("csv", "tsv"):
            quoted = options.format == "csv"
            yield DelimitedTable(path, file, options.delimiter or ",", quoted, options.header is not False)
        elif options.format == "jsonl":
            yield JsonLines(path, file)
        else:
            yield _Lines(file, options)


class _Lines:
    """A txt or smi file: one column, whatever it is called."""

    def __init__(self, file: TextIO, options: InputOptions):
        self._file, self._molecules, self._header = file, options.format == "smi", options.header
        self.names = ["smiles" if self._molecules else "text"]
        self.not_text: dict[str, str] = {}

    def texts(self, column: str) -> Iterator[tuple[int, str | None, str]]:
        """(number, text, "") of each line."""
        for number, line in enumerate(self._file, 1):
            if not self._molecules:
                yield number, line.rstrip("\r\n"), ""
                continue
            words = line.split(maxsplit=1)
            if words and not (number == 1 and self._header is not False and words[0].lower() == "smiles"):
                yield number, words[0], ""

    def records(self, text: str | None) -> Iterator[tuple[int, dict[str, str | None], str, str]]:
        """(number, the text by its name, "", "") of each line that is not blank."""
        for number, line, _ in self.texts(self.names[0]):
            if line and line.strip():
                yield number, {self.names[0]: line}, "", ""
