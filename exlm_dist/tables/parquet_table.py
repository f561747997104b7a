"""Parquet. The fields of structs have dotted names (`meta.url`); bytes are decoded as UTF-8."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exlm_dist.tables.columns import as_text, listed
from exlm_dist.tables.text_files import compression
from exlm_dist.utils.errors import DataError

ROWS_AT_ONCE = 8192
INSTALL = "pip install pyarrow"


class ParquetTable:
    """A parquet file. names: its columns, of a struct its fields. not_text: the type of those that hold no text."""

    def __init__(self, path: Path):
        import pyarrow.parquet as parquet
        import pyarrow.types as types

        self._file = parquet.ParquetFile(path)
        top = self._file.schema_arrow.names
        if len(set(top)) < len(top):
            twice = sorted({name for name in top if top.count(name) > 1})
            raise DataError(f"{path}: several columns have the same name: {listed(twice)}. Rename them.")
        leaves = {".".join(names): (names, kind) for names, kind in _leaves(self._file.schema_arrow)}
        self.names = list(leaves)
        self.not_text = {name: str(kind) for name, (_, kind) in leaves.items() if types.is_nested(kind)}
        self._paths = {name: names for name, (names, _) in leaves.items()}

    def texts(self, column: str) -> Iterator[tuple[int, str | None, str]]:
        """(number, text, "") of each row."""
        return ((number, text, "") for number, (text,) in enumerate(self._rows([column]), 1))

    def records(self, text: str | None) -> Iterator[tuple[int, dict[str, str | None], str, str]]:
        """(number, values, "", "") of each row."""
        return ((number, dict(zip(self.names, row)), "", "") for number, row in enumerate(self._rows(self.names), 1))

    def _rows(self, names: list[str]) -> Iterator[tuple[str | None, ...]]:
        for batch in self._file.iter_batches(batch_size=ROWS_AT_ONCE, columns=names):
            whole = {name: _values(batch.column(name)) for name in batch.schema.names}
            paths = [self._paths[name] for name in names]
            yield from zip(*([as_text(_inner(value, inner)) for value in whole[top]] for top, *inner in paths))


@contextmanager
def open_parquet(path: Path) -> Iterator[ParquetTable]:
    """The table in `path`. DataError if pyarrow is missing or the file is damaged."""
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow: {INSTALL}") from error
    if packed := compression(path):
        raise DataError(f"{path}: parquet within {packed} cannot be read; decompress it first.")
    try:
        yield ParquetTable(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not readable as parquet ({error}).") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise DataError(f"{path}: not readable as parquet ({error}). Copy it again.") from error


def _values(array: Any) -> list[Any]:
    """The values of an array; texts as bytes if one of them, against the rules of parquet, is not UTF-8."""
    import pyarrow

    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        plain = array.dictionary_decode() if pyarrow.types.is_dictionary(array.type) else array
        return plain.cast(pyarrow.large_binary()).to_pylist()


def _leaves(fields: Iterable[Any], outer: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, type) of the columns that are no structs: names of the structs around a column, and its own."""
    import pyarrow.types as types

    for field in fields:
        path = (*outer, field.name)
        if types.is_struct(field.type) and field.type.num_fields:
            yield from _leaves([field.type.field(index) for index in range(field.type.num_fields)], path)
        else:
            yield path, field.type


def _inner(value: Any, path: Sequence[str]) -> Any:
    """What `path` leads to in structs; None in a struct that is null."""
    for name in path:
        value = None if value is None else value[name]
    return value
