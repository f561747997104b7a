"""The files that one rank writes of a checkpoint, hashed as they are written. Knows no rank and no torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from exlm_dist.checkpoint import reader
from exlm_dist.checkpoint.pieces import Shape
from exlm_dist.checkpoint.tensors import INDEX_FILE, write_header
from exlm_dist.utils.errors import CheckpointError
from exlm_dist.utils.files import write_all

#: Bytes hashed and written at a time.
BLOCK = 4 << 20
REMEDY = "Older checkpoints are untouched. Free space there; with a lower checkpoint.keep a run needs less."


class SaveFailed(CheckpointError):
    """A checkpoint could not be written. Nothing that could be taken for one is left, older ones are untouched."""


class FileEntry(TypedDict):
    """A file in the manifest."""

    bytes: int
    sha256: str


#: By path relative to the checkpoint.
Entries = dict[str, FileEntry]


@dataclass(frozen=True)
class TensorFile:
    """A file of fp32 tensors (shapes by name) whose elements are contiguous in memory, from byte `offset` on."""

    name: str
    tensors: dict[str, Shape]
    offset: int
    bytes: int


@dataclass(frozen=True)
class SmallFiles:
    """Files without tensors, by path relative to the checkpoint: content of `texts`, paths of the originals of
    `copies`."""

    texts: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of_run(index: str, state: Mapping[str, Any], config: str, tokenizer: Path) -> SmallFiles:
        """All of a checkpoint: text of the index, state, text of the resolved config, folder of the tokenizer."""
        texts = {
            INDEX_FILE: index,
            reader.STATE_FILE: json.dumps(state, indent=2, sort_keys=True) + "\n",
            reader.CONFIG_FILE: config,
        }
        originals = (path for path in sorted(Path(tokenizer).iterdir()) if path.is_file())
        return SmallFiles(texts, {f"{reader.TOKENIZER_FOLDER}/{path.name}": str(path) for path in originals})


def not_finite(file: TensorFile, memory: Any) -> str | None:
    """Name of a tensor with a NaN or an infinity, if there is one."""
    at = file.offset
    for name, shape in file.tensors.items():
        count = math.prod(shape)
        values = np.frombuffer(memory, np.float32, count, at)
        with np.errstate(all="ignore"):
            total = values.sum()  # cheap, and conclusive where it is finite
        if not np.isfinite(total) and not np.isfinite(values).all():
            return name
        at += count * 4
    return None


def write_files(folder: Path, tensors: Iterable[TensorFile], memory: Any, small: SmallFiles) -> Entries:
    """Write one rank's files into the folder of `begin` and force them to the disk. `memory`: elements of the tensors.

    SaveFailed.
    """
    entries: Entries = {}
    try:
        for file in tensors:
            elements = memoryview(memory).cast("B")[file.offset : file.offset + file.bytes]
            entries[file.name] = write_file(folder / file.name, [write_header(file.tensors), elements])
        for name, text in small.texts.items():
            entries[name] = write_file(folder / name, [text.encode()])
        for name, original in small.copies.items():
            entries[name] = write_file(folder / name, [Path(original).read_bytes()])
    except OSError as error:
        raise save_failed(error, folder) from error
    return entries


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> FileEntry:
    """Write a new file and force it to the disk. OSError."""
    digest, size = hashlib.sha256(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for part in parts:
            for start in range(0, len(part), BLOCK):
                block = part[start : start + BLOCK]
                digest.update(block)
                write_all(handle, block)
                size += len(block)
        os.fsync(handle)
    finally:
        os.close(handle)
    return {"bytes": size, "sha256": digest.hexdigest()}


def save_failed(error: OSError, temporary: Path) -> SaveFailed:
    """`error`, met while writing to the folder `temporary`, in words for people."""
    if isinstance(error, FileNotFoundError):
        return SaveFailed(
            f"{error.filename} is not there. Is the run folder on a file system that all machines of the job can see?"
        )
    return SaveFailed(f"{temporary} could not be written: {error.strerror or error}. {REMEDY}")
