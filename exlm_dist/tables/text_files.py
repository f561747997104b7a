"""Text of a file: decompressed (gzip, zstd, bzip2, xz) and decoded (UTF-8; UTF-16 and UTF-32 by their mark).

Bytes that are not UTF-8 are passed on as surrogates (`errors="surrogateescape"`), so that the caller can set a single
row aside instead of giving up the file.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from exlm_dist.utils.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

#: Endings of compressed files, and the bytes with which their content begins.
COMPRESSED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00"}
#: Marks of encodings, the longer ones first: that of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_HEAD = 4096
#: The longest window that the format has; public dumps are written with windows above the library's limit.
_ZSTD_WINDOW = 1 << 31


def compression(path: Path) -> str:
    """'.gz', '.zst', '.bz2', '.xz' or '', from the content; DataError if the name says another one."""
    with open(path, "rb") as file:
        head = file.read(8)
    skippable = head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50  # a zstd frame without data
    found = next((ending for ending, magic in COMPRESSED.items() if head.startswith(magic)), "")
    found = ".zst" if skippable else found
    named = path.suffix.lower()
    if named in COMPRESSED and not found:
        raise DataError(
            f"{path}: damaged or cut off: its content is not that of a {named} file. Copy it again, or take {named} "
            "off its name if it is not compressed."
        )
    return found


def encoding(path: Path) -> str:
    """Python's name of the encoding: 'utf-8-sig', or that of the mark with which the text begins.

    DataError for UTF-16 without a mark.
    """
    with open_binary(path) as file:
        head = file.read(_HEAD)
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    for name, zeros in (("UTF-16LE", head[1::2]), ("UTF-16BE", head[::2])):
        if len(head) >= 4 and zeros.count(0) > 0.4 * len(head) / 2 and head.count(0) < 1.2 * zeros.count(0):
            raise DataError(
                f"{path}: reads as UTF-16 without a byte order mark. Make it UTF-8: iconv -f {name} -t UTF-8 "
                f"{shlex.quote(str(path))} (of what is compressed, the content)."
            )
    return "utf-8-sig"


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """The decompressed text of `path`; lines end with \\n, \\r or \\r\\n, which is kept. DataError if it is damaged."""
    name = encoding(path)
    errors = "surrogateescape" if name == "utf-8-sig" else "surrogatepass"
    with open_binary(path) as file:
        try:
            yield io.TextIOWrapper(file, encoding=name, errors=errors, newline="")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: damaged or cut off ({error.reason} in {name}). Copy it again.") from error


@contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """The decompressed content of `path`. DataError if it is damaged."""
    kind = compression(path)
    with open(path, "rb") as raw:
        try:
            yield _decompressed(raw, kind)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the system, not of the content
                raise
            raise DataError(f"{path}: damaged or cut off ({error}). Copy it again.") from error


def _decompressed(raw: BinaryIO, kind: str) -> BinaryIO:
    if kind == ".zst":
        return io.BufferedReader(_ZstdStream(raw))
    readers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return readers[kind](raw) if kind in readers else raw


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
                frame = frame or zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
                try:
                    yield frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise EOFError(str(error)) from error
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
        if frame is not None:
            raise EOFError("it ends inside a zstd frame")
