"""A cell: a task, split, method, setting of the grid and seed. Its result is one file, there as a whole or not at all.

OUT/cells/TASK/SPLIT/METHOD/GRID/seed-N.json; beside it, while it is computed, seed-N.partial, and seed-N.failed.json
where that failed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exlm_dist.suites.methods import Method
from exlm_dist.utils.errors import CheckpointError
from exlm_dist.utils.files import write_json
from exlm_dist.utils.locks import lock

FORMAT = 1
CELLS = "cells"
FAILED = ".failed.json"
#: Name of the folder of a cell to which the grid has nothing to say.
NO_GRID = "protocol"

Setting = float | int | str | bool


@dataclass(frozen=True)
class Cell:
    """What is trained once and measured. grid: settings that replace those of the protocol, in the order of names."""

    task: str
    split: str
    method: Method
    grid: tuple[tuple[str, Setting], ...]
    seed: int

    def __str__(self) -> str:
        grid = "".join(f" {name}={value}" for name, value in self.grid)
        return f"{self.task} {self.split} {self.method.label}{grid} seed {self.seed}"

    def path(self, out: Path) -> Path:
        """File of its result."""
        return self._path(out, self.split)

    def twins(self, out: Path) -> list[Path]:
        """Files of the results of the same on other splits."""
        folders = sorted((out / CELLS / self.task).glob("*"))
        paths = [self._path(out, folder.name) for folder in folders if folder.name != self.split]
        return [path for path in paths if path.exists()]

    def _path(self, out: Path, split: str) -> Path:
        grid = ",".join(f"{name}={value}" for name, value in self.grid) or NO_GRID
        return out / CELLS / self.task / split / self.method.key / grid / f"seed-{self.seed}.json"

    def described(self) -> dict[str, Any]:
        """What its result says of it."""
        method = self.method
        return {
            "task": self.task,
            "split": self.split,
            "method": {
                **{name: getattr(method, name) for name in ("kind", "label", "key", "frozen", "probe")},
            },
            "checkpoint": method.facts,
            "grid": dict(self.grid),
            "seed": self.seed,
        }


class Busy(Exception):
    """Another process is computing the cell."""


@contextmanager
def claimed(path: Path) -> Iterator[Path | None]:
    """A folder for what a cell needs while it is computed, which survives a kill and is this process's alone; None if
    its result is there already. Busy if another process has it."""
    partial = path.with_suffix(".partial")
    handle = _open_lock(partial)
    try:
        try:
            lock(handle, partial)  # where there are no locks, at worst two processes compute the same
        except BlockingIOError:
            raise Busy from None
        yield None if path.exists() else partial
        if path.exists():
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(handle)


def publish_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write the result of a cell; an earlier failure of it is forgotten."""
    write_json(path, {"format": FORMAT, **result})
    path.with_name(path.stem + FAILED).unlink(missing_ok=True)


def publish_failure(path: Path, cell: Cell, reason: str) -> None:
    """Write why a cell has failed. It is tried again when the same is asked for again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path.with_name(path.stem + FAILED), {"format": FORMAT, **cell.described(), "reason": reason})


def read_results(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(results, failures) of all cells in the folder. CheckpointError for a damaged one."""
    paths = sorted((out / CELLS).glob("*/*/*/*/seed-*.json"))
    failed = [path for path in paths if path.name.endswith(FAILED)]
    return [read_result(path) for path in paths if path not in failed], [read_result(path) for path in failed]


def read_result(path: Path) -> dict[str, Any]:
    """The result of a cell, or its failure. CheckpointError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}). Remove it, and the same evaluation again makes it anew."
        ) from error


def _open_lock(partial: Path) -> int:
    """File descriptor of the lock of a cell, which the process that ends with it may remove at any moment."""
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            return os.open(partial / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue
