"""Blocks of remote files on the node's disk, common to its ranks, without locks.

A block is written beside its place and renamed, so that it is whole or not there; two ranks that fetch the same one
write the same bytes. The oldest go when there are more bytes than the limit. A process that is killed leaves at most a
temporary file, which goes with the next eviction.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path

from exlm_dist.utils.errors import ConfigError, DataError

#: Environment variables: folder of the cache, and the most that it holds, in 10^9 bytes.
CACHE, CACHE_GB = "EXLM_CACHE", "EXLM_CACHE_GB"
DEFAULT_GB = 20.0
#: Blocks that a process writes between two looks at the size of the cache, and seconds that a temporary file may live.
WRITES_BETWEEN, STALE = 16, 3600.0


def cache_folder() -> Path:
    """`EXLM_CACHE`, else a folder of this user in the temporary folder, which batch systems have on the node's disk.
    DataError if it belongs to another user or cannot be made."""
    given = os.environ.get(CACHE)
    folder = Path(given).expanduser() if given else Path(tempfile.gettempdir()) / f"exlm-cache-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise DataError(
            f"{folder}: no cache for remote data can be made here ({error.strerror}). Set {CACHE} to a folder on the "
            "node's disk."
        ) from error
    if not given and owner != os.getuid():
        raise DataError(f"{folder}: belongs to another user. Set {CACHE} to a folder of your own on the node's disk.")
    return folder


def cache_limit() -> int:
    """Bytes, from `EXLM_CACHE_GB`. ConfigError if that is no positive number."""
    text = os.environ.get(CACHE_GB, str(DEFAULT_GB))
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit < 1e9:
        raise ConfigError(f"{CACHE_GB}={text!r}: must be a number above 0, in 10^9 bytes.")
    return int(limit * 1e9)


class BlockCache:
    """Blocks by key (of a file) and number; `limit`: bytes, exceeded by what the ranks write between two looks."""

    def __init__(self, folder: Path, limit: int):
        self._folder, self._limit = folder / "blocks", limit
        self._written = 0

    def open(self, key: str, number: int, size: int) -> int | None:
        """A file descriptor of the block, which must have `size` bytes; None if it is not there."""
        path = self._path(key, number)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(handle).st_size != size:  # cut off by a power failure
            os.close(handle)
            return None
        with contextlib.suppress(FileNotFoundError):  # evicted meanwhile: the descriptor stays good
            os.utime(path)
        return handle

    def put(self, key: str, number: int, content: bytes) -> None:
        """Store a block. DataError if the disk is full even without the other blocks."""
        if self._written % WRITES_BETWEEN == 0:
            self._evict(self._limit)
        self._written += 1
        try:
            self._write(self._path(key, number), content)
        except OSError:
            self._evict(0)
            try:
                self._write(self._path(key, number), content)
            except OSError as error:
                raise DataError(
                    f"{self._folder}: the cache of remote data cannot be written ({error.strerror}). Set {CACHE} to a "
                    f"folder with more room, or {CACHE_GB} to less."
                ) from error

    def drop(self, key: str, number: int) -> None:
        """Remove a block."""
        self._path(key, number).unlink(missing_ok=True)

    def _path(self, key: str, number: int) -> Path:
        return self._folder / key / f"{number:08d}"

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
        try:
            with open(handle, "wb") as file:
                file.write(content)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _evict(self, limit: int) -> None:
        """Remove the blocks that were used longest ago until nine tenths of `limit` are left, if there are more."""
        found = []
        now = time.time()
        for folder, _, names in os.walk(self._folder):
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):  # another rank removed it
                    status = os.stat(path)
                    if name.endswith(".tmp") and now - status.st_mtime > STALE:
                        os.unlink(path)
                    else:
                        found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        if total <= limit:
            return
        for _, size, path in sorted(found):
            if total <= 0.9 * limit:
                break
            if not path.endswith(".tmp"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size


def key_of(address: str, size: int, digest: str) -> str:
    """Names a file in the cache: another content gives another name."""
    return hashlib.sha256(f"{address}\n{size}\n{digest}".encode()).hexdigest()[:32]
