"""What a rank and the process that writes its checkpoints tell each other, as JSON: a job, and later its outcome."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from typing import Any

from exlm_dist.checkpoint.rank_files import Entries, SmallFiles, TensorFile


@dataclass(frozen=True)
class WriteJob:
    """Write one rank's files into `folder`, after forcing the files `sync` to the disk.

    `tensors`: the file of the parameters first; `step`: of the checkpoint.
    """

    folder: str
    step: int
    tensors: list[TensorFile]
    small: SmallFiles
    sync: list[str]


@dataclass(frozen=True)
class PublishJob:
    """Turn `folder`, with the `files` of all ranks in it, into the checkpoint `target`; then remove older ones.

    `keep`, `best`: which of them stay, as in `storage.retain`.
    """

    folder: str
    target: str
    step: int
    files: Entries
    keep: int
    best: bool


@dataclass(frozen=True)
class Written:
    """A `WriteJob` is done: the files of this rank."""

    files: Entries


@dataclass(frozen=True)
class Published:
    """A `PublishJob` is done: names of the checkpoints `removed`, and what went wrong after the publication."""

    removed: list[str]
    alarm: str | None = None


class Failure(str, Enum):
    """What has failed: writing, the process that writes, or the training (a parameter is not finite)."""

    DISK = "disk"
    LOST = "lost"
    VALUES = "values"


@dataclass(frozen=True)
class Failed:
    """A job came to nothing; `why` is for people."""

    kind: Failure
    why: str


Job = WriteJob | PublishJob
Outcome = Written | Published | Failed


def to_json(message: Job | Outcome) -> str:
    """The message as JSON, its class as `message`."""
    return json.dumps({"message": type(message).__name__, **vars(message)}, default=vars)


def job_from_json(text: str | bytes) -> Job:
    """The reverse of `to_json` for a job."""
    name, fields = _read(text)
    if name == PublishJob.__name__:
        return PublishJob(**fields)
    tensors = [_tensor_file(**file) for file in fields.pop("tensors")]
    return WriteJob(tensors=tensors, small=SmallFiles(**fields.pop("small")), **fields)


def outcome_from_json(text: str | bytes) -> Outcome:
    """The reverse of `to_json` for an outcome."""
    name, fields = _read(text)
    if name == Failed.__name__:
        return Failed(Failure(fields["kind"]), fields["why"])
    return Written(**fields) if name == Written.__name__ else Published(**fields)


def _read(text: str | bytes) -> tuple[str, dict[str, Any]]:
    fields = json.loads(text)
    return fields.pop("message"), fields


def _tensor_file(tensors: dict[str, list[int]], **fields: Any) -> TensorFile:
    return TensorFile(tensors={name: tuple(shape) for name, shape in tensors.items()}, **fields)
