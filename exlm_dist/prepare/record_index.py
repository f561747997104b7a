"""The index of one foreign shard: its records, checksums and lengths in tokens, taken in one reading from the front."""

from __future__ import annotations

import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.data.places import address_of
from exlm_dist.data.random_smiles import ATTEMPTS, RandomSmiles
from exlm_dist.data.record_tokens import RANDOM, RECORD_DTYPE, RecordEncoder, encoder_of
from exlm_dist.data.remote import Remote
from exlm_dist.data.sample_text import FORBIDDEN, FORMS, Ending, Unusable, ending_of, split_content
from exlm_dist.data.tar_members import DamagedShard, Member, ShardStream, read_members
from exlm_dist.tokenizers.tokenizer import UNK
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.files import content_hash, fingerprint_of, write_atomic

#: Bytes of a read, here and over the network.
LOCAL_BLOCK, REMOTE_BLOCK = 1 << 20, 8 << 20
#: Characters of a record that the list of those set aside has.
SHOWN = 500
_VERSION = 1


@dataclass(frozen=True)
class IndexTask:
    """One shard and all that its index depends on. `changed`: its time of change here, which tells an edited one."""

    place: str
    size: int
    changed: int
    tokenizer: str  # folder
    fingerprint: str  # of the tokenizer
    field: str
    payload: int  # most tokens of a sequence, BOS and EOS not counted
    endings: tuple[str, ...]
    random: RandomSmiles

    def part(self, folder: Path) -> Path:
        """Where the index of this shard is put aside until all are done."""
        identity = {**asdict(self), "tokenizer": "", "version": _VERSION}
        return folder / f"{fingerprint_of(identity)[:32]}.npz"


@dataclass
class ShardPart:
    """The index of one shard. Counts: members read = used + those set aside, samples read = kept + those set aside."""

    sha256: str = ""
    members: int = 0
    used: int = 0
    samples: int = 0
    kept: int = 0
    members_aside: Counter[str] = field(default_factory=Counter)
    aside: Counter[str] = field(default_factory=Counter)
    random: Counter[str] = field(default_factory=Counter)  # of random SMILES
    drawn_again: Counter[str] = field(default_factory=Counter)
    listed: list[tuple[str, int, str, str]] = field(default_factory=list)  # member, line from 1, reason, text
    records: np.ndarray = field(default_factory=lambda: np.empty(0, RECORD_DTYPE))
    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))  # of the sample of each record
    unknown: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32))  # unknown tokens of each record

    def check_sum(self, place: str) -> None:
        """RuntimeError if not everything that was read is accounted for."""
        if self.members != self.used + self.members_aside.total() or self.samples != self.kept + self.aside.total():
            raise RuntimeError(
                f"{place}: {self.members} members read, {self.used} used, {dict(self.members_aside)} set aside; "
                f"{self.samples} samples read, {self.kept} kept, {dict(self.aside)} set aside"
            )

    def save(self, path: Path) -> None:
        """Write the part, whole or not at all."""
        counts = {name: value for name, value in vars(self).items() if name not in ("records", "hashes", "unknown")}
        stream = io.BytesIO()
        np.savez(
            stream,
            records=self.records,
            hashes=self.hashes,
            unknown=self.unknown,
            counts=np.frombuffer(json.dumps(counts).encode(), np.uint8),
        )
        write_atomic(path, stream.getvalue())

    @classmethod
    def load(cls, path: Path) -> ShardPart:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            counts: dict[str, Any] = json.loads(stored["counts"].tobytes())
            arrays = {name: stored[name] for name in ("records", "hashes", "unknown")}
        for name in ("members_aside", "aside", "random", "drawn_again"):
            counts[name] = Counter(counts[name])
        return cls(**counts, **arrays)


def index_shard(folder: str, task: IndexTask) -> str:
    """In a worker process: write the part of one shard into `folder`, unless it is there. Empty, or what is wrong with
    the shard."""
    path = task.part(Path(folder))
    if path.exists():
        return ""
    try:
        part = _read_shard(task)
    except DamagedShard as error:
        return str(error)
    part.check_sum(task.place)
    part.save(path)
    return ""


def shard_stream(place: str, size: int) -> ShardStream:
    """The bytes of a shard from the front. DamagedShard, when it is read, if it cannot be opened."""
    blocks = Remote().stream(place, size, REMOTE_BLOCK) if address_of(place) else _local_blocks(place)
    return ShardStream(place, blocks)


def endings_in(place: str, size: int, most: int = 1000) -> Counter[str]:
    """How often each ending occurs in the first members of a shard."""
    found: Counter[str] = Counter()
    for member in read_members(shard_stream(place, size)):
        found[ending_of(member.name).name] += not member.problem
        if found.total() >= most:
            break
    return +found


def _local_blocks(place: str) -> Iterator[bytes]:
    try:
        with open(place, "rb", buffering=0) as file:
            while block := file.read(LOCAL_BLOCK):
                yield block
    except OSError as error:
        raise DamagedShard(f"{place}: cannot be read ({error.strerror or os.strerror(error.errno or 0)}).") from error


def _read_shard(task: IndexTask) -> ShardPart:
    part = ShardPart()
    rows = _Rows(encoder_of(task.tokenizer, task.field, task.payload, task.random), part)
    stream = shard_stream(task.place, task.size)
    for member in read_members(stream):
        part.members += 1
        ending = ending_of(member.name)
        if problem := member.problem or _not_wanted(ending, task.endings):
            part.members_aside[problem] += 1
            continue
        try:
            found = list(split_content(member.content, ending.form, ending.gzip))
        except Unusable as error:
            part.members_aside[str(error).split(":")[0]] += 1
            part.listed.append((member.name, 1, str(error), ""))
            continue
        part.used += 1
        for number, (offset, size, line) in enumerate(found, 1):
            rows.add(member, ending, number, offset, size, line)
    if stream.position != task.size:
        raise DamagedShard(
            f"{task.place}: has {stream.position:,} bytes, {task.size:,} a moment ago: it is still being written. "
            "Index it when it is whole."
        )
    rows.finish()
    part.sha256 = stream.sha256
    return part


def _not_wanted(ending: Ending, wanted: tuple[str, ...]) -> str:
    """Why a member with this ending is not read; empty if it is."""
    if set(ending.name.split(".")) & set(FORBIDDEN):
        return f"code or pickle (.{ending.name})"
    return "" if ending.name in wanted else f"other ending (.{ending.name})"


class _Rows:
    """Collects the sequences of a shard in columns."""

    def __init__(self, encoder: RecordEncoder, part: ShardPart):
        self._encoder, self._part = encoder, part
        self._rows: list[tuple[int, ...]] = []
        self._hashes: list[int] = []
        self._unknown: list[int] = []

    def add(self, member: Member, ending: Ending, number: int, offset: int, size: int, line: int) -> None:
        """Add the record at `offset` of a member, the `number`th in it, or set it aside."""
        part = self._part
        content = member.content if size == len(member.content) else member.content[offset : offset + size]
        part.samples += 1
        try:
            value, pieces = self._encoder.pieces(content, ending.form, ending.gzip, line)
        except Unusable as error:
            reason = str(error)
            part.aside[reason.split(":")[0]] += 1
            shown = content[:SHOWN].decode("utf-8", "backslashreplace")
            part.listed.append((member.name, number, reason, "" if ending.gzip else shown))
            return
        part.kept += 1
        sample = content_hash(value.encode() if isinstance(value, str) else value.tobytes())
        place, crc, form = member.offset + offset, zlib.crc32(content), FORMS.index(ending.form)
        for piece in pieces:
            where = (place, size, crc)
            if piece.last is not None:
                run = content[piece.first : piece.last]
                where = (place + piece.first, len(run), zlib.crc32(run))
            self._rows.append((*where, len(piece.tokens), piece.start, piece.stop, line, form, piece.flags))
            self._hashes.append(sample)
            self._unknown.append(int(np.count_nonzero(piece.tokens == UNK)))
        if pieces[-1].flags & RANDOM:
            part.drawn_again.update(chain.from_iterable(piece.again for piece in pieces))
            part.random.update(
                molecules=1,
                distinct=len({piece.tokens.tobytes() for piece in pieces}),
                canonical_instead=sum(len(piece.again) == ATTEMPTS for piece in pieces),
            )

    def finish(self) -> None:
        """Put what was collected into the part."""
        self._part.records = np.array(self._rows, RECORD_DTYPE)
        self._part.hashes = np.array(self._hashes, np.uint64)
        self._part.unknown = np.array(self._unknown, np.uint32)


def task_size(place: str) -> tuple[int, int]:
    """Bytes of a shard, and when it changed (ns; 0 behind an address). DataError if it is not there."""
    if address_of(place):
        return Remote().size(place), 0
    try:
        status = os.stat(place)
    except OSError as error:
        raise DataError(f"{place}: {error.strerror}.") from error
    return status.st_size, status.st_mtime_ns
