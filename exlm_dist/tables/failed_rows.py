"""Rows of the input that could not be used, each with its position and the reason."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TextIO

from exlm_dist.utils.files import sync_path

HEADER = "file\trow\treason\ttext\n"
LONGEST_TEXT = 500


def failed_line(file: str, row: int, reason: str, text: str) -> str:
    """A line of the list: tabs, line ends and backslashes are escaped, long texts cut."""
    return f"{_escaped(file)}\t{row}\t{_escaped(reason)}\t{_escaped(text[:LONGEST_TEXT])}\n"


def failed_rows_path(output: Path) -> Path:
    """Where the failed rows of the table `output` are listed: beside it."""
    return output.with_name(f"{output.name}.failed.tsv")


class FailedRows:
    """The list of failed rows at `path`, a context manager. The file appears when the block succeeds, as a whole, and
    only if a row failed; one that an earlier call left there is removed otherwise."""

    def __init__(self, path: Path):
        self.path = path
        self.count = 0
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file: TextIO | None = None

    def __enter__(self) -> FailedRows:
        return self

    def add(self, file: str, row: int, reason: str, text: str = "") -> None:
        """List a row: the file it is from, its number there, why it failed, and what was read."""
        if self._file is None:
            self._file = open(self._temporary, "w", encoding="utf-8", errors="backslashreplace", newline="\n")
            self._file.write(HEADER)
        self._file.write(failed_line(file, row, reason, text))
        self.count += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is None:
            if kind is None:
                self.path.unlink(missing_ok=True)
            return
        try:
            self._file.close()
            if kind is None:
                sync_path(self._temporary)
                os.replace(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
