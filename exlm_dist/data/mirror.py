"""A folder of data behind an address: its manifest, tokenizer and index are copied to the node once, its shards stay.

The copy is a folder like any other, but for a file that says where the shards are. It is made beside its place and
renamed, by one rank of the node while the others wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from exlm_dist.data.block_cache import cache_folder
from exlm_dist.data.places import address_of, joined
from exlm_dist.data.remote import Remote
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.outputs import user_path

#: One line: the folder or address that the names of shards in the manifest are relative to. No part of the fingerprint,
#: so that shards can be moved. Without this file they are in the folder itself.
SHARDS_AT = "shards-at.txt"
_MANIFEST = "manifest.json"
#: Bytes of one request, and seconds to wait for another rank of the node that makes the same copy.
_CHUNK, PATIENCE = 8 << 20, 600.0


def data_folder(place: Path | str) -> Path:
    """The folder on this machine that stands for `place`: itself, or the copy of what is behind an address.

    DataError if that cannot be read, or is damaged.
    """
    address = address_of(place)
    return user_path(place) if address is None else _mirrored(address.rstrip("/"))


def shard_root(folder: Path) -> str:
    """The folder or address that the names of shards in the manifest of `folder` are relative to."""
    path = folder / SHARDS_AT
    if not path.is_file():
        return str(folder)
    root = path.read_text(encoding="utf-8").strip()
    return root if address_of(root) or not root else str(user_path(root))


def local_shard(folder: Path, name: str) -> Path | None:
    """Path of a shard of the data in `folder`; None if it is behind an address."""
    place = joined(shard_root(folder), name)
    return None if address_of(place) else Path(place)


def named_files(manifest: dict[str, Any]) -> dict[str, str | None]:
    """Names of the small files of a folder (tokenizer, index, where its shards are), and the SHA-256 of each (None: any
    content). DataError for a name that leads out of the folder."""
    files: dict[str, str | None] = dict(manifest["tokenizer"]["files"])
    for split in manifest["splits"].values():
        files |= {shard["index"]: shard["index_sha256"] for shard in split["shards"]}
    if manifest.get("form", "tokens") != "tokens":
        files[SHARDS_AT] = None
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or address_of(name):
            raise DataError(f"a manifest that names {name!r}: only files within its folder are read.")
    return files


@functools.lru_cache(maxsize=16)
def _mirrored(address: str) -> Path:
    remote = Remote()
    content = _whole(remote, f"{address}/{_MANIFEST}")
    try:
        files = named_files(json.loads(content))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{address}/{_MANIFEST}: is no manifest of prepared data ({error}).") from error
    key = hashlib.sha256(address.encode() + b"\n" + content).hexdigest()[:32]
    folder = cache_folder() / "folders" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(folder.with_suffix(".lock")):
        if not (folder / _MANIFEST).is_file():
            _copy(remote, address, content, files, folder)
    return folder


def _copy(remote: Remote, address: str, manifest: bytes, files: dict[str, str | None], folder: Path) -> None:
    new = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=folder.parent))
    try:
        for name, expected in files.items():
            content = _checked(remote, f"{address}/{name}", expected)
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(content)
        if SHARDS_AT not in files:
            (new / SHARDS_AT).write_text(f"{address}\n", encoding="utf-8")
        (new / _MANIFEST).write_bytes(manifest)
        with contextlib.suppress(OSError):  # made by another rank that did not wait; the content is the same
            os.rename(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if not (folder / _MANIFEST).is_file():
        raise DataError(f"{folder}: the copy of {address} could not be put here. Set EXLM_CACHE to another folder.")


def _checked(remote: Remote, address: str, expected: str | None) -> bytes:
    """The file at `address`, read once more if it is not as expected."""
    for _ in range(2):
        content = _whole(remote, address)
        got = hashlib.sha256(content).hexdigest()
        if expected in (None, got):
            return content
    raise DataError(f"{address}: sha256 {got}, expected {expected} (damaged). Copy it there again.")


def _whole(remote: Remote, address: str) -> bytes:
    size = remote.size(address)
    return b"".join(remote.stream(address, size, _CHUNK))


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Wait until no other process is here, but at most `PATIENCE` seconds. The lock ends with its process."""
    with open(path, "w") as file:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        yield
