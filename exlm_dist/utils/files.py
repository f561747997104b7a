"""Files that are either whole or not there: write beside, flush to disk, rename."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def sync_path(path: Path) -> None:
    """Force to the disk what has been written to a file, or the entries of a directory (so that a rename in it survives
    a power cut)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(handle: int, data: bytes | memoryview) -> None:
    """Write all of `data` to an open file; a disk that fills up meanwhile is an OSError."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(handle, rest) :]


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace the file at `path` by `content` in one step: readers see the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            write_all(handle, content.encode() if isinstance(content, str) else content)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically."""
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of the content of `path`."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_bytes(content: bytes) -> str:
    """Hexadecimal SHA-256 of `content`."""
    return hashlib.sha256(content).hexdigest()


def fingerprint_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def content_hash(content: bytes | memoryview) -> int:
    """64-bit hash by which duplicates are found, the held-out split is chosen, and random SMILES are drawn."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
