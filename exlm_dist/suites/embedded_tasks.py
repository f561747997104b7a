"""What the encoder of a checkpoint makes of the molecules of a task, computed once for all its splits, in
OUT/embeddings/METHOD/[seed-N/]TASK.npz."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exlm_dist.suites.cells import Busy
from exlm_dist.utils.files import write_atomic
from exlm_dist.utils.locks import lock

EMBEDDINGS = "embeddings"


@dataclass(frozen=True)
class Embedded:
    """fp32 [n, D], for each used row of a task; how many are cut; how many have a token that the vocabulary lacks."""

    features: np.ndarray
    truncated: int
    unknown: int


def embedded(path: Path, compute: Callable[[], Embedded], *, wait: bool = True) -> Embedded:
    """What is in the file, computed and written if it is not there (or is damaged). Of several processes one computes
    it: the others wait until that one is done or dead, or without `wait` are Busy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as file:
        try:
            lock(file.fileno(), file.name, wait=wait)  # without locks at worst two processes compute the same
        except BlockingIOError:
            raise Busy from None
        if (found := _read(path)) is None:
            found = compute()
            content = io.BytesIO()
            np.savez(content, features=found.features, counts=np.array([found.truncated, found.unknown]))
            write_atomic(path, content.getvalue())
        return found


def _read(path: Path) -> Embedded | None:
    try:
        with np.load(path) as arrays:
            truncated, unknown = arrays["counts"].tolist()
            return Embedded(arrays["features"], truncated, unknown)
    except (FileNotFoundError, zipfile.BadZipFile, KeyError, ValueError):
        return None
