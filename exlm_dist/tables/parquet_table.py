"""Parquet. The fields of structs have dotted names (`meta.url`); bytes are decoded as UTF-8."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exlm_dist.tables.columns import as_text, listed
from exlm_dist.utils.errors import DataError

ROWS_AT_ONCE = 8192
INSTALL = "pip install pyarrow"


class ParquetTable:
    """A parquet file. names: its columns, for a struct those of its fields."""

    def __init__(self, path: Path):
        import pyarrow.parquet as parquet

        self._path = path
        self._file = parquet.ParquetFile(path)
        top = self._file.schema_arrow.names
        if len(set(top)) < len(top):
            twice = sorted({name for name in top if top.count(name) > 1})
            raise DataError(f"{path}: several columns have the same name: {listed(twice)}. Rename them.")
        leaves = list(_leaves(self._file.schema_arrow))
        self._paths = {".".join(names): names for names, _ in leaves}
        self._types = {".".join(names): kind for names, kind in leaves}
        self.names = list(self._paths)

    def texts(self, column: str) -> Iterator[tuple[int, str | None, str]]:
        """(number, text, problem) of each row. DataError if the column holds no text."""
        for number, values, _, _ in self._rows([column], column):
            yield number, values[column], ""

    def records(self, text: str | None) -> Iterator[tuple[int, dict[str, str | None], str, str]]:
        """(number, values, "", "") of each row. DataError if the column `text` holds no text."""
        return self._rows(self.names, text)

    def _rows(self, names: list[str], text: str | None) -> Iterator[tuple[int, dict[str, str | None], str, str]]:
        import pyarrow.types as types

        if text is not None and types.is_nested(self._types[text]):
            raise DataError(
                f"{self._path}: column {text!r} holds {self._types[text]}, not text. Its columns: {listed(self.names)}."
            )
        number = 0
        for batch in self._file.iter_batches(batch_size=ROWS_AT_ONCE, columns=names):
            columns = {name: batch.column(name).to_pylist() for name in batch.schema.names}
            paths = [(name, columns[self._paths[name][0]], self._paths[name][1:]) for name in names]
            for row in range(batch.num_rows):
                number += 1
                yield number, {name: as_text(_inner(column[row], path)) for name, column, path in paths}, "", ""


@contextmanager
def open_parquet(path: Path) -> Iterator[ParquetTable]:
    """The table in `path`. DataError if pyarrow is missing or the file is damaged."""
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow: {INSTALL}") from error
    try:
        yield ParquetTable(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not readable as parquet ({error}).") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise DataError(f"{path}: not readable as parquet ({error}). Copy it again.") from error


def _leaves(fields: Iterable[Any], outer: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, type) of the columns that are no structs: names of the structs around a column, and its own."""
    import pyarrow.types as types

    for field in fields:
        path = (*outer, field.name)
        if types.is_struct(field.type) and field.type.num_fields:
            yield from _leaves([field.type.field(index) for index in range(field.type.num_fields)], path)
        else:
            yield path, field.type


def _inner(value: Any, path: tuple[str, ...]) -> Any:
    """What `path` leads to in structs; None in a struct that is null."""
    for name in path:
        value = None if value is None else value[name]
    return value
