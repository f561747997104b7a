"""`exlm data repair`: damaged files of a folder of data, replaced by those of a copy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from exlm_dist.data.manifest import MANIFEST, read_manifest
from exlm_dist.data.mirror import data_folder, shard_root
from exlm_dist.data.places import address_of, joined
from exlm_dist.prepare.data_check import all_shards, file_problem, shard_problem, small_files
from exlm_dist.prepare.record_index import shard_stream, task_size
from exlm_dist.utils.errors import ConfigError, DataError
from exlm_dist.utils.files import sync_path
from exlm_dist.utils.outputs import check_space, user_path
from exlm_dist.utils.progress import Progress

_CHUNK = 8 << 20


@dataclass(frozen=True)
class Repair:
    """A damaged file, and whether a copy of it could be put in its place."""

    problem: str
    source: str
    failure: str  # empty: it is whole now

    def __str__(self) -> str:
        return f"{self.problem}\n  " + (self.failure or f"replaced by {self.source}")


def repair_data(folder: Path | str, copy: Path | str) -> Iterator[Repair]:
    """Replace each file of `folder` that is missing or not as its manifest says by that of `copy`: the same data in
    another folder or behind an address, or a folder with the same shards alone.

    A file is written beside its place, compared with its SHA-256 and renamed, so that a training that reads the folder
    meanwhile sees the old or the whole one. DataError for a manifest that cannot be used, ConfigError for data that is
    not on this machine.
    """
    if address_of(folder):
        raise ConfigError(f"{folder}: only data on this machine is repaired. Copy it there again.")
    folder = user_path(folder)
    manifest = read_manifest(folder)
    copied, shards_at = _places_of(copy)
    for name, digest in small_files(manifest).items():
        if problem := file_problem(folder / name, digest):
            source = str(copied / name) if copied else ""
            yield _repaired(problem, folder / name, source, digest)
    root, shards = shard_root(folder), all_shards(manifest)
    with Progress("repair", "shards", len(shards)) as progress:
        for shard in shards:
            place = joined(root, shard["name"])
            if problem := shard_problem(place, shard):
                if address_of(place):
                    raise ConfigError(f"{problem}. Only shards on this machine are repaired: copy it there again.")
                source = joined(shards_at, shard["name"])
                yield _repaired(problem, Path(place), source, shard["sha256"])
            progress.update(1)


def _places_of(copy: Path | str) -> tuple[Path | None, str]:
    """The folder with the manifest of a copy, if it has one, and the folder or address of its shards."""
    if address_of(copy) is None and not (user_path(copy) / MANIFEST).is_file():
        if not user_path(copy).is_dir():
            raise DataError(f"{copy}: no such folder.")
        return None, str(user_path(copy))
    folder = data_folder(copy)
    return folder, shard_root(folder)


def _repaired(problem: str, path: Path, source: str, digest: str) -> Repair:
    if not source:
        return Repair(problem, source, "the copy has no such file: it has shards alone")
    try:
        got = _copied(path, source, digest)
    except (DataError, OSError) as error:
        return Repair(problem, source, f"the copy cannot be read: {error}")
    return Repair(problem, source, "" if got == digest else f"the copy is damaged too: {source}: sha256 {got}")


def _copied(path: Path, source: str, digest: str) -> str:
    """SHA-256 of `source`, which is put in the place of `path` if it is the expected one."""
    size, _ = task_size(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    check_space(path, size, "the copy")
    stream = shard_stream(source, size)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            while chunk := stream.read(_CHUNK):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if stream.sha256 == digest:
            os.replace(temporary, path)
            sync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return stream.sha256
