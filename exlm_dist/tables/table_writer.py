"""Tables of results: csv, tsv, jsonl, parquet, npz; written in chunks, and there as a whole or not at all."""

from __future__ import annotations

import errno
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.tables.columns import as_text
from exlm_dist.tables.parquet_table import INSTALL
from exlm_dist.tables.table_formats import (
    Column,
    DelimitedFormat,
    JsonLinesFormat,
    NpzFormat,
    ParquetFormat,
    TableFormat,
)
from exlm_dist.utils.errors import ConfigError, DataError
from exlm_dist.utils.files import sync_path
from exlm_dist.utils.outputs import check_writable, user_path

#: Endings of the tables that can be written.
OUTPUTS: dict[str, Callable[[Path], TableFormat]] = {
    ".csv": lambda path: DelimitedFormat(path, tabs=False),
    ".tsv": lambda path: DelimitedFormat(path, tabs=True),
    ".jsonl": JsonLinesFormat,
    ".parquet": ParquetFormat,
    ".npz": NpzFormat,
}


class TableWriter:
    """Writes a table to `path` in the format of its ending; a context manager.

        with TableWriter(Path("out.parquet")) as table:
            table.write({"smiles": ["CCO", "CCN"], "embedding": np.zeros((2, 64), np.float32)})

    Columns are lists of str, of numbers, or arrays [n] or [n, d]; each chunk has the same ones. Missing are None, NaN,
    and a row of NaN in an array [n, d]. They become an empty cell in csv and tsv, null in jsonl and parquet, NaN (of
    texts: the empty one) in npz. A row of an array [n, d] becomes d cells in csv and tsv (NAME_0, ...), and a list
    in jsonl and parquet.

    The file is written beside its place and renamed when the block succeeds; if the block fails, nothing is left.
    At once ConfigError if the ending is unknown, or the file there already and not `overwrite`, and OutputError if it
    cannot be made; its folder is made. DataError if writing fails.
    """

    def __init__(self, path: Path, overwrite: bool = False):
        self._path, self._overwrite = user_path(path), overwrite
        self._check()
        self._target = Path(os.path.realpath(self._path))  # a link stays, and leads to the new file
        self._temporary = self._target.with_name(f".{self._target.name}.{os.getpid()}.tmp")
        self._types: dict[str, np.dtype | None] = {}

    def __enter__(self) -> TableWriter:
        with self._explained():
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._format = OUTPUTS[self._path.suffix.lower()](self._temporary)
        return self

    def write(self, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> None:
        """Append rows. ValueError if the columns differ in length, or from those of the first chunk."""
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"the columns of a chunk must have one length: {lengths}")
        if self._types and list(self._types) != list(columns):
            raise ValueError(f"columns {list(columns)}, after {list(self._types)} in the first chunk")
        typed = {name: self._typed(name, column) for name, column in columns.items()}
        with self._explained():
            self._format.write(typed)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self._explained():
                self._format.close(complete=kind is None)
                if kind is not None:
                    return
                if not self._types:
                    raise DataError(f"{self._path}: there is nothing to write.")
                self._check()
                sync_path(self._temporary)
                os.replace(self._temporary, self._target)
                sync_path(self._target.parent)
        finally:
            self._temporary.unlink(missing_ok=True)

    def _typed(self, name: str, column: Sequence[Any] | np.ndarray) -> Column:
        """The column as texts or numbers, of the type of its first chunk."""
        if name not in self._types:
            self._types[name] = _type_of(column)
        dtype = self._types[name]
        if dtype is None:
            return [as_text(value) for value in (column.tolist() if isinstance(column, np.ndarray) else column)]
        numbers = _numbers(column) if len(column) else np.empty_like(column, dtype=dtype)
        return numbers.astype(dtype, casting="same_kind", copy=False)

    def _check(self) -> None:
        """ConfigError or OutputError if the file may not or cannot be written."""
        path = self._path
        if path.suffix.lower() not in OUTPUTS:
            raise ConfigError(f"{path}: the name of the table must end in one of {', '.join(OUTPUTS)}.")
        if path.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise ConfigError(f"{path}: writing parquet needs pyarrow: {INSTALL}")
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder; name a file in it.")
        if path.exists() and not self._overwrite:
            raise ConfigError(f"{path}: exists. Choose another name, or replace it with --overwrite.")
        check_writable(path)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = " Free some space, or choose another disk." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise DataError(f"{self._path}: cannot be written: {error.strerror or error}.{full}") from error


def _type_of(column: Sequence[Any] | np.ndarray) -> np.dtype | None:
    """The type of a column of numbers; None for texts, and for a list of nothing but None."""
    if isinstance(column, np.ndarray):
        return column.dtype if column.dtype.kind in "fiub" else None
    filled = [value for value in column if value is not None]
    numeric = bool(filled) and all(isinstance(value, (int, float, np.number)) for value in filled)
    return _numbers(column).dtype if numeric else None


def _numbers(column: Sequence[Any] | np.ndarray) -> np.ndarray:
    if isinstance(column, np.ndarray):
        return column
    return np.array([np.nan if value is None else value for value in column])
