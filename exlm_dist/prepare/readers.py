"""Input files to rows of text: csv, tsv, txt, smi, jsonl, parquet; .gz and .zst; many files and patterns.

Bytes that are not UTF-8 are passed on as surrogates (`errors="surrogateescape"`), so that the caller can set a single
row aside instead of giving up the file.
"""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TextIO

from exlm_dist.utils.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".text": "txt",
    ".smi": "smi",
    ".smiles": "smi",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".zst")


class Row(NamedTuple):
    """One input text and its position: data row (csv, tsv, parquet) or line (other formats), counted from 1."""

    file: str
    row: int
    text: str
    problem: str = ""  # why the row cannot be used, if reading it showed that


def expand_inputs(inputs: list[str]) -> list[Path]:
    """The files that paths and patterns name, in the order given, those of one pattern sorted. DataError if missing."""
    files: list[Path] = []
    for item in inputs:
        path = Path(item)
        if path.is_dir():
            raise DataError(
                f"{item}: is a folder; name files, or quote a pattern such as '{item.rstrip('/')}/*.smi.gz'."
            )
        names = [item] if path.is_file() else sorted(glob.glob(item, recursive=True))
        found = [Path(name) for name in names if Path(name).is_file()]
        if not found:
            raise DataError(_missing(path, item))
        files.extend(file for file in found if file not in files)
    if not files:
        raise DataError("no input file given.")
    for path in files:
        file_format(path)
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty.")
    return files


def file_format(path: Path) -> str:
    """'csv', 'tsv', 'txt', 'smi', 'jsonl' or 'parquet', from the name without .gz or .zst."""
    suffix = _plain_suffix(path)
    if suffix not in FORMATS:
        raise DataError(
            f"{path}: cannot read '{suffix or path.name}' files; the name must end in one of {', '.join(FORMATS)}, "
            f"which {' or '.join(COMPRESSED)} may follow."
        )
    return FORMATS[suffix]


def read_rows(path: Path, column: str | None, default_column: str) -> Iterator[Row]:
    """Rows of one file. `column` names the csv, tsv or parquet column or jsonl field; if None, it is the only column
    or `default_column`, in upper or lower case. In txt files each line is a row, in smi files the first word of each
    line that is neither blank nor the header. DataError for a wrong column or a damaged file.
    """
    kind = file_format(path)
    try:
        if kind == "parquet":
            yield from _parquet(path, column, default_column)
            return
        with open_text(path) as file:
            if kind in ("csv", "tsv"):
                yield from _table(path, file, kind, column, default_column)
            elif kind == "jsonl":
                yield from _json_lines(path, file, column, default_column)
            elif kind == "smi":
                yield from _molecule_lines(path, file)
            else:
                for number, line in enumerate(file, 1):
                    yield Row(str(path), number, line.rstrip("\r\n"))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged or cut off ({error}). Copy it again.") from error


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """The decompressed text of `path`."""
    if path.suffix.lower() == ".gz":
        with gzip.open(path, "rb") as file:
            yield _decoded(file)
    elif path.suffix.lower() == ".zst":
        import zstandard

        try:
            with open(path, "rb") as raw:
                yield _decoded(io.BufferedReader(_ZstdStream(raw)))
        except zstandard.ZstdError as error:
            raise DataError(f"{path}: damaged or cut off ({error}). Copy it again.") from error
    else:
        with open(path, "rb") as file:
            yield _decoded(file)


def _decoded(binary: io.BufferedReader | gzip.GzipFile) -> TextIO:
    return io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of one or more zstd frames. EOFError if the file ends inside a frame, which the library's own
    reader takes for a whole file.
    """

    def __init__(self, raw: BinaryIO):
        self._chunks = self._decompress(raw)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer)
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(target), len(self._rest))
        target[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    @staticmethod
    def _decompress(raw: BinaryIO) -> Iterator[bytes]:
        import zstandard

        frame = None
        while data := raw.read(1 << 17):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
        if frame is not None:
            raise EOFError("it ends inside a zstd frame")


def choose_column(path: Path, columns: list[str], column: str | None, default: str) -> str:
    """Name of the column to read; the DataError for a wrong one lists the columns and suggests a similar one."""
    if column is not None:
        if column in columns:
            return column
        raise DataError(
            f"{path}: has no column {column!r}{_suggestion(column, columns)}. Its columns: {_listed(columns)}."
        )
    if len(columns) == 1:
        return columns[0]
    matches = [name for name in columns if name.strip().lower() == default]
    if len(matches) == 1:
        return matches[0]
    raise DataError(f"{path}: name the column of the {default} with --column NAME. Its columns: {_listed(columns)}.")


def _table(path: Path, file: TextIO, kind: str, column: str | None, default: str) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    rows = csv.reader(file) if kind == "csv" else csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    try:
        columns = [name.strip() for name in next(rows, [])]
        if not columns:
            raise DataError(f"{path}: the file is empty (no header line).")
        index = columns.index(choose_column(path, columns, column, default))
        for number, fields in enumerate((fields for fields in rows if fields), 1):
            yield Row(str(path), number, fields[index] if index < len(fields) else "")
    except csv.Error as error:
        raise DataError(f"{path}: not a well-formed {kind} file, line {rows.line_num}: {error}.") from error


def _molecule_lines(path: Path, file: TextIO) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        fields = line.split(maxsplit=1)
        if fields and not (number == 1 and fields[0].lower() == "smiles"):
            yield Row(str(path), number, fields[0])


def _json_lines(path: Path, file: TextIO, column: str | None, default: str) -> Iterator[Row]:
    chosen = column
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError:
            yield Row(str(path), number, line.strip(), "not JSON")
            continue
        if isinstance(item, str):
            yield Row(str(path), number, item)
            continue
        if not isinstance(item, dict):
            yield Row(str(path), number, line.strip(), "not a JSON object with named fields")
            continue
        if chosen is None or chosen not in item:
            chosen = choose_column(path, list(item), column, default)
        value = item[chosen]
        yield Row(str(path), number, value if isinstance(value, str) else "" if value is None else str(value))


def _parquet(path: Path, column: str | None, default: str) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install 'exlm_dist[parquet]'.") from error
    try:
        table = parquet.ParquetFile(path)
        chosen = choose_column(path, table.schema_arrow.names, column, default)
        number = 0
        for batch in table.iter_batches(columns=[chosen]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield Row(str(path), number, "" if value is None else str(value))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not readable as parquet ({error}).") from error


def _plain_suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _missing(path: Path, item: str) -> str:
    if any(character in item for character in "*?["):
        return f"{item}: no file matches this pattern."
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"{item}: no such file{_suggestion(path.name, names)}."


def _suggestion(wrong: str, names: list[str]) -> str:
    lowered = {name.lower(): name for name in names}
    near = difflib.get_close_matches(wrong.lower(), list(lowered), n=1)
    return f" (did you mean {lowered[near[0]]!r}?)" if near else ""


def _listed(columns: list[str], limit: int = 30) -> str:
    shown = ", ".join(repr(name) for name in columns[:limit])
    return shown + (f" and {len(columns) - limit} more" if len(columns) > limit else "")
