"""The formats of output tables. Each takes chunks of columns, which are lists of texts (None: missing) or arrays of
numbers [n] or [n, d] (NaN: missing)."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias

import numpy as np

from exlm_dist.tables.columns import as_text, listed
from exlm_dist.utils.errors import DataError

Column: TypeAlias = "list[str | None] | np.ndarray"
_ESCAPES = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})
_SPECIAL = re.compile(r'[,"\r\n]')
#: Limit of a text column in npz, where each text takes the room of the longest one.
NPZ_TEXT_BYTES = 1 << 31


class TableFormat(Protocol):
    """A way to write a table to a file."""

    def write(self, columns: Mapping[str, Column]) -> None:
        """Append rows; the columns and their types are those of the first chunk."""

    def close(self, complete: bool) -> None:
        """End the file. What is not complete will be deleted."""


class DelimitedFormat:
    """csv; or tsv, which has no quotes: in it a tab or line end within a text becomes \\t, \\n or \\r."""

    def __init__(self, path: Path, tabs: bool):
        self._file = open(path, "w", encoding="utf-8", errors="surrogateescape", newline="")
        self._delimiter, self._cell = ("\t", _escaped) if tabs else (",", _quoted)
        self._begun = False

    def write(self, columns: Mapping[str, Column]) -> None:
        """Append rows; an array [n, d] makes columns NAME_0 to NAME_(d-1). DataError if two would have one name."""
        names: list[str] = []
        cells: list[list[str]] = []
        for name, column in columns.items():
            if not isinstance(column, np.ndarray):
                names.append(name)
                cells.append([self._cell(text or "") for text in column])
            elif column.ndim == 1:
                names.append(name)
                cells.append(_number_cells(column))
            else:
                names += [f"{name}_{index}" for index in range(column.shape[1])]
                cells += [_number_cells(part) for part in column.T]
        if not self._begun:
            self._begin(names)
        if len(cells) == 1 and self._delimiter == ",":
            cells[0] = [cell or '""' for cell in cells[0]]  # an empty line would be no row
        self._file.writelines(self._delimiter.join(row) + "\n" for row in zip(*cells))

    def _begin(self, names: list[str]) -> None:
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice:
            raise DataError(f"two columns would be called {listed(twice)}. Rename those of the input.")
        self._file.write(self._delimiter.join(map(self._cell, names)) + "\n")
        self._begun = True

    def close(self, complete: bool) -> None:
        """Close the file."""
        self._file.close()


class JsonLinesFormat:
    """JSON lines; a row of an array [n, d] is a list."""

    def __init__(self, path: Path):
        self._file = open(path, "w", encoding="utf-8", errors="backslashreplace", newline="\n")

    def write(self, columns: Mapping[str, Column]) -> None:
        """Append a line for each row."""
        names = [json.dumps(name, ensure_ascii=False) for name in columns]
        for row in zip(*map(_json_values, columns.values())):
            self._file.write("{" + ", ".join(map("{}: {}".format, names, row)) + "}\n")

    def close(self, complete: bool) -> None:
        """Close the file."""
        self._file.close()


class ParquetFormat:
    """Parquet; a row of an array [n, d] is a list, not one of fixed size: Arrow cannot read null ones of those."""

    def __init__(self, path: Path):
        self._file = open(path, "wb")
        self._writer: Any = None

    def write(self, columns: Mapping[str, Column]) -> None:
        """Append a row group."""
        import pyarrow
        import pyarrow.parquet as parquet

        table = pyarrow.table({name: _arrow(column) for name, column in columns.items()})
        if self._writer is None:
            self._writer = parquet.ParquetWriter(self._file, table.schema)
        self._writer.write_table(table)

    def close(self, complete: bool) -> None:
        """End the file with its index."""
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
            self._file.close()


class NpzFormat:
    """One array a column. Numbers wait in unnamed files, as the size of an array stands before its content, texts in
    memory."""

    def __init__(self, path: Path):
        self._path = path
        self._numbers: dict[str, IO[bytes]] = {}
        self._forms: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self._texts: dict[str, list[str]] = {}
        self._longest: dict[str, int] = {}
        self._rows = 0
        path.touch()

    def write(self, columns: Mapping[str, Column]) -> None:
        """Append to each array. DataError if an array of texts becomes too large."""
        for name, column in columns.items():
            if isinstance(column, np.ndarray):
                if name not in self._numbers:
                    self._numbers[name] = tempfile.TemporaryFile(dir=self._path.parent)
                    self._forms[name] = column.dtype, column.shape[1:]
                self._numbers[name].write(np.ascontiguousarray(column).data)
            else:
                texts = self._texts.setdefault(name, [])
                texts += [text or "" for text in column]
                self._longest[name] = max([self._longest.get(name, 1), *map(len, texts[-len(column) :])])
                if 4 * len(texts) * self._longest[name] > NPZ_TEXT_BYTES:
                    raise DataError(
                        f"column {name!r} has texts of up to {self._longest[name]:,} characters; in npz, each would "
                        "take the room of the longest. Write .parquet or .csv instead."
                    )
        self._rows += len(column)

    def close(self, complete: bool) -> None:
        """Put the arrays into the file."""
        try:
            if complete:
                self._store()
        finally:
            for file in self._numbers.values():
                file.close()

    def _store(self) -> None:
        with zipfile.ZipFile(self._path, "w", allowZip64=True) as archive:
            for name, file in self._numbers.items():
                dtype, inner = self._forms[name]
                header = {"descr": dtype.str, "fortran_order": False, "shape": (self._rows, *inner)}
                file.seek(0)
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, header)
                    shutil.copyfileobj(file, member, 1 << 20)
            for name, texts in self._texts.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.array(texts, dtype=str), allow_pickle=False)


def _quoted(text: str) -> str:
    """A cell of csv. (Python's writer leaves a carriage return without quotes, which ends a line for its reader.)"""
    return '"' + text.replace('"', '""') + '"' if _SPECIAL.search(text) else text


def _escaped(text: str) -> str:
    """A cell of tsv."""
    return text.translate(_ESCAPES)


def _number_cells(column: np.ndarray) -> list[str]:
    """An array [n] as cells, missing ones empty; numbers in their shortest form."""
    if column.dtype.kind != "f":
        return [as_text(value) or "" for value in column.tolist()]
    cells = column.astype(str)
    cells[np.isnan(column)] = ""
    return cells.tolist()


def _json_values(column: Column) -> list[str]:
    """The JSON of each row, missing ones null; numbers in their shortest form."""
    if not isinstance(column, np.ndarray) or column.dtype.kind != "f":
        return [
            json.dumps(value, ensure_ascii=False) for value in (column if isinstance(column, list) else column.tolist())
        ]
    values = column.astype(str)
    values[~np.isfinite(column)] = "null"
    if column.ndim == 1:
        return values.tolist()
    rows = [f"[{', '.join(row)}]" for row in values.tolist()]
    for index in np.flatnonzero(np.isnan(column).all(axis=1)):
        rows[index] = "null"
    return rows


def _arrow(column: Column) -> Any:
    """A column as an array of Arrow, missing values and rows null."""
    import pyarrow

    if not isinstance(column, np.ndarray):
        try:
            return pyarrow.array(column, pyarrow.string())
        except UnicodeEncodeError:
            clean = [text and text.encode("utf-8", "backslashreplace").decode() for text in column]
            return pyarrow.array(clean, pyarrow.string())
    if column.ndim == 1:
        return pyarrow.array(column, from_pandas=True)
    null = np.isnan(column).all(axis=1) if column.dtype.kind == "f" else np.zeros(len(column), dtype=bool)
    offsets = np.arange(len(column) + 1, dtype=np.int32) * column.shape[1]
    values = pyarrow.array(np.ascontiguousarray(column).ravel())
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), values, mask=pyarrow.array(null))
