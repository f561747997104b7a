"""Checkpoints on disk: written whole or not at all, old ones removed. Pure files: knows no rank and no torch.

The format is described in docs/checkpoints.md and read by `exlm_dist.checkpoint.reader`. Order of a save: temporary
folder, every file with fsync, manifest with their hashes, COMPLETE with the hash of the manifest, rename, pointer
`latest`. A kill at any moment leaves either the former state or the new checkpoint; `latest` is a hint for people,
never read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from exlm_dist.checkpoint import reader
from exlm_dist.checkpoint.pieces import Shape
from exlm_dist.checkpoint.tensors import INDEX_FILE, write_header
from exlm_dist.utils.checkpoint_names import CHECKPOINTS, COMPLETE_FILE
from exlm_dist.utils.errors import CheckpointError
from exlm_dist.utils.files import sync_path, write_all, write_atomic

LATEST = "latest"
#: Bytes beside those of the tensors: headers, state, config, and a margin for the log of the run.
SPACE_MARGIN = 16 << 20
#: Bytes hashed and written at a time.
BLOCK = 4 << 20
REMEDY = "Older checkpoints are untouched. Free space there, or lower checkpoint.keep."


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


def begin(target: Path, needed: int) -> Path:
    """Make the folder that becomes `target` when it is published.

    SaveFailed, with both figures, unless `needed` bytes and a margin are free.
    """
    free = shutil.disk_usage(target.parent).free
    if free < needed + SPACE_MARGIN:
        raise SaveFailed(
            f"a checkpoint needs {(needed + SPACE_MARGIN) / 1e6:.0f} MB but only {free / 1e6:.0f} MB are free in "
            f"{target.parent}. {REMEDY}"
        )
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        os.mkdir(temporary)
        os.mkdir(temporary / reader.TOKENIZER_FOLDER)
    except OSError as error:
        raise _failed(error, temporary) from error
    return temporary


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
        raise _failed(error, folder) from error
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


def publish(temporary: Path, target: Path, step: int, files: Entries) -> None:
    """Turn the folder of `begin`, with all `files` in it, into the checkpoint `target`. SaveFailed."""
    try:
        for name, entry in files.items():
            if (temporary / name).stat().st_size != entry["bytes"]:
                raise SaveFailed(f"{temporary / name} is not as long as it was written. {REMEDY}")
        manifest = {"format": reader.FORMAT, "step": step, "files": files}
        text = json.dumps(manifest, indent=2, sort_keys=True).encode()
        entry = write_file(temporary / reader.MANIFEST_FILE, [text])
        sync_path(temporary / reader.TOKENIZER_FOLDER)
        sync_path(temporary)
        write_file(temporary / COMPLETE_FILE, [entry["sha256"].encode() + b"\n"])
        sync_path(temporary)
        if target.exists():  # a damaged one that training has reached again
            _discard(target)
        os.rename(temporary, target)
        sync_path(target.parent)
        write_atomic(target.parent / LATEST, target.name + "\n")
    except OSError as error:
        raise _failed(error, temporary) from error


def _failed(error: OSError, temporary: Path) -> SaveFailed:
    if isinstance(error, FileNotFoundError):
        return SaveFailed(
            f"{error.filename} is not there. Is the run folder on a file system that all machines of the job can see?"
        )
    return SaveFailed(f"{temporary} could not be written: {error.strerror or error}. {REMEDY}")


def _discard(folder: Path) -> None:
    """Remove a checkpoint; it vanishes in one step, so that no half of it can be taken for a checkpoint."""
    trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def clean(run_folder: Path) -> None:
    """Remove what killed saves left behind. Call only while holding the lock of the run."""
    folder = Path(run_folder) / CHECKPOINTS
    for pattern in (".tmp-*", ".trash-*", f".{LATEST}.*"):
        for path in folder.glob(pattern):
            # Writers of a launch that is just ending may still be at work in it.
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def retain(run_folder: Path, keep: int, best: bool) -> list[Path]:
    """Remove all but the newest `keep` whole checkpoints and, if `best`, the one with the lowest evaluation nll.

    Those that are not whole are left for inspection. Returns what was removed.
    """
    whole = [folder for folder in reader.checkpoint_folders(run_folder) if looks_whole(folder)]
    kept = set(whole[:keep])
    if best:
        evaluated = {folder: nll for folder in whole if (nll := evaluation_nll(folder)) is not None}
        kept.update(sorted(evaluated, key=lambda folder: evaluated[folder])[:1])
    removed = [folder for folder in whole if folder not in kept]
    for folder in removed:
        _discard(folder)
    return removed


def has_whole(run_folder: Path) -> bool:
    """Whether the run has a checkpoint that looks whole (sizes, not hashes)."""
    return any(looks_whole(folder) for folder in reader.checkpoint_folders(run_folder))


def looks_whole(folder: Path) -> bool:
    """Whether marker, manifest and sizes are right (hashes are not compared)."""
    try:
        reader.verify(folder, hashes=False)
    except (CheckpointError, OSError, ValueError):
        return False
    return True


def evaluation_nll(folder: Path) -> float | None:
    """nll per masked token on the held-out split at the step of this checkpoint, if it was measured there."""
    evaluation = reader.read_state(folder).get("evaluation")
    return evaluation["nll"] if evaluation else None
