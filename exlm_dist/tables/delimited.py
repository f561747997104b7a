"""Rows of csv and tsv. In csv, fields may stand in double quotes (RFC 4180); in tsv, quotes are ordinary characters.

A row that is not well-formed never changes another one: it is passed on with its problem, and reading goes on with the
next line.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from statistics import mode
from typing import NamedTuple, TextIO

from exlm_dist.tables.columns import kind_of_column, unique_names
from exlm_dist.utils.errors import DataError

#: A quoted field with more characters is taken for one whose closing quote is missing.
LONGEST_FIELD = 1 << 26
#: What the rows before tell of a column is looked up in so many, and believed from `ENOUGH` on.
_RECENT, _ENOUGH = 50, 5


class Fields(NamedTuple):
    """A row of a table, or a line of it that is none."""

    values: list[str]
    problem: str = ""
    raw: str = ""  # the line itself, if there is a problem


def split_rows(lines: Iterable[str], delimiter: str, quoted: bool) -> Iterator[Fields]:
    """The rows in `lines` that are not blank. `quoted`: fields may stand in double quotes, and then hold delimiters and
    line ends."""
    if quoted:
        return _split_quoted(iter(lines), delimiter)
    stripped = (line.rstrip("\r\n") for line in lines)
    return (Fields(line.split(delimiter)) for line in stripped if line)


class DelimitedTable:
    """A csv or tsv file. names: those of its header; without one, the numbers of its columns from 1, of which it has as
    many as most of its first rows."""

    def __init__(self, path: Path, file: TextIO, delimiter: str, quoted: bool, header: bool):
        self._rows = split_rows(file, delimiter, quoted)
        self._delimiter = delimiter
        self.not_text: dict[str, str] = {}
        self._before = list(islice(self._rows, 1 if header else _RECENT))  # read to find the columns
        good = [fields.values for fields in self._before if not fields.problem]
        if not self._before or (not good and not header):
            raise DataError(f"{path}: the file is empty (no row in it).")
        if header:
            first = self._before.pop()
            if first.problem:
                raise DataError(f"{path}: its header cannot be read ({first.problem}): {first.raw[:200]!r}.")
            self.names = unique_names(first.values)
        else:
            self.names = [str(number) for number in range(1, width_without_header(good) + 1)]

    def texts(self, column: str) -> Iterator[tuple[int, str | None, str]]:
        """(number, text, problem) of each row; with a problem, the text is the row as it stands in the file."""
        index = self.names.index(column)
        for number, fields in self._numbered():
            yield (number, fields.raw, fields.problem) if fields.problem else (number, fields.values[index], "")

    def records(self, text: str | None) -> Iterator[tuple[int, dict[str, str | None], str, str]]:
        """(number, values, problem, the row as it stands in the file if there is a problem) of each row."""
        for number, fields in self._numbered():
            values = {name: value or None for name, value in zip(self.names, fields.values)}
            yield number, values, fields.problem, fields.raw

    def _numbered(self) -> Iterator[tuple[int, Fields]]:
        width = len(self.names)
        for number, fields in enumerate(chain(self._before, self._rows), 1):
            yield number, fields if len(fields.values) == width else self._fitted(fields, width)

    def _fitted(self, fields: Fields, width: int) -> Fields:
        values, problem, raw = fields
        if not problem and (len(values) < width or any(value.strip() for value in values[width:])):
            problem = f"ragged: {len(values)} columns where {width} are expected"
            raw = self._delimiter.join(values)
        return Fields([*values[:width], *[""] * (width - len(values))], problem, raw)


def _split_quoted(lines: Iterator[str], delimiter: str) -> Iterator[Fields]:
    """Each row is read by Python's strict parser. When it fails, or a quoted field has swallowed rows, only the first
    line is set aside: the others are read again."""
    again: deque[str] = deque()  # lines given back
    taken: list[str] = []  # lines of the row that is being read
    recent: deque[list[str]] = deque(maxlen=_RECENT)
    header: list[str] = []  # the first row, which may be one

    def pull() -> Iterator[str]:
        while True:
            line = again.popleft() if again else next(lines, None)
            if line is None:
                return
            taken.append(line)
            yield line

    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(pull(), delimiter=delimiter, strict=True)
    first = 1  # number of the first line of the row
    while True:
        taken.clear()
        problem = ""
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = str(error)
        if not problem and len(taken) > 1 and _swallowed_rows(values, taken, recent, header or values, delimiter):
            problem = f"the quoted text up to line {first + len(taken) - 1} looks like rows"
        if problem:
            again.extendleft(reversed(taken[1:]))
            reader = csv.reader(pull(), delimiter=delimiter, strict=True)
            yield Fields([], f"stray quote: line {first}: {problem}", taken[0].rstrip("\r\n"))
            first += 1
            continue
        first += len(taken)
        if values:
            if header:
                recent.append(values)
            header = header or values
            yield Fields(values)


def _swallowed_rows(
    values: list[str], lines: list[str], before: Sequence[list[str]], header: list[str], delimiter: str
) -> bool:
    """Whether a field over several lines has rows in it: a field beside it has a quote without standing in quotes; its
    row has another number of fields than the rows before (not to count empty ones at the end); each line of it is one
    word, like all values of its column before; or its lines have as many fields as rows have, one of them a number or
    SMILES in all."""
    raw = "".join(lines)
    if any('"' in value and '"' + value.replace('"', '""') + '"' not in raw for value in values):
        return True
    width = mode(map(len, before or [header]))
    if _filled(values) > width or len(values) < min(width, max(map(_filled, before or [header]))):
        return True
    columns = [[row[index] for row in before if len(row) == width] for index in range(width)]
    at = next((index for index, value in enumerate(values) if "\n" in value or "\r" in value), 0)
    texts = [text for text in columns[at] if text] if at < width else []
    if len(texts) >= _ENOUGH and all(
        len(line.split()) <= 1 for text in texts + [values[at]] for line in text.split("\n")
    ):
        return True
    *middle, last = (line.rstrip("\r\n").split(delimiter) for line in lines[1:])
    if any(len(row) != width for row in middle):
        return False
    for index, column in enumerate(columns):
        inside = [row[index] for row in middle]
        if index < at and len(last) == width:  # of the last line, what follows the field may be a row's in any case
            inside.append(last[index])
        enough = inside and len(column) + len(inside) >= _ENOUGH
        if enough and kind_of_column(column + inside) in ("number", "molecule"):
            return True
    return False


def _filled(row: list[str]) -> int:
    """How many fields a row has, not to count empty ones at the end."""
    return max((number for number, value in enumerate(row, 1) if value.strip()), default=0)


def width_without_header(rows: Sequence[list[str]]) -> int:
    """How many columns most of the first rows have, of several numbers as frequent the one that comes first."""
    return mode(map(len, rows))


def first_rows(lines: Iterable[str], delimiter: str, quoted: bool, count: int) -> list[list[str]]:
    """The first `count` rows that are well-formed."""
    rows = islice(split_rows(lines, delimiter, quoted), count)
    return [fields.values for fields in rows if not fields.problem]
