"""Shards of token sequences: WebDataset tars with many sequences per member, an index written beside them, a reader.

A shard `shard-000000.tar` holds pairs of members `000000.tokens.npy` (the ids of up to 512 sequences, joined; uint16 or
uint32) and `000000.lengths.npy` (uint32). Its index `shard-000000.idx.npy` has one row per sequence: byte offset of its
ids in the tar, their number, and the crc32 of their bytes. A tar has no checksum of its own and readers of tars take
many kinds of damage for the end of the archive, so the index, not the tar, says what is there.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exlm_dist.data.manifest import MANIFEST, SPLITS, TOKENIZER, ShardEntry, read_manifest
from exlm_dist.tokenizers.tokenizer import NUM_SPECIAL, UNK
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.files import sha256_file
from exlm_dist.utils.logs import get_logger

INDEX_DTYPE = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc", "<u4")])
OPEN_FILES = 128
_log = get_logger(__name__)


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest unsigned type that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class ShardWriter:
    """Writes ragged batches of payload ids (no BOS, no EOS) to numbered shards below `root/split`.

    The bytes are a function of the sequences alone: fixed owner, mode and time in every header. `close` returns the
    entries for the manifest; every file is flushed to disk before that.
    """

    def __init__(self, root: Path, split: str, *, vocab_size: int, shard_bytes: int = 64 << 20, per_member: int = 512):
        self._root, self._split = Path(root), split
        self._dtype = token_dtype(vocab_size)
        self._vocab_size, self._shard_bytes, self._per_member = vocab_size, shard_bytes, per_member
        self._tokens: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._waiting = 0
        self._shard: _OpenShard | None = None
        self.entries: list[ShardEntry] = []
        (self._root / split).mkdir(parents=True, exist_ok=True)

    def write(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append sequences: `tokens` [sum of lengths] ids, `lengths` [m], each at least 1."""
        lengths = np.asarray(lengths, dtype=np.int64)
        tokens = np.asarray(tokens)
        if len(lengths) == 0:
            return
        if lengths.min() < 1 or lengths.sum() != len(tokens):
            raise ValueError(
                f"lengths (sum {lengths.sum()}, least {lengths.min()}) do not describe {len(tokens)} tokens"
            )
        if tokens.max() >= self._vocab_size or np.any((tokens < NUM_SPECIAL) & (tokens != UNK)):
            raise ValueError("a payload holds a special id or one outside the vocabulary")
        self._tokens.append(tokens.astype(self._dtype))
        self._lengths.append(lengths.astype(np.uint32))
        self._waiting += len(lengths)
        if self._waiting >= self._per_member:
            self._flush(whole_members_only=True)

    def close(self) -> list[ShardEntry]:
        """Write what is waiting, finish the last shard, and return the entries of all shards in order."""
        if self._waiting:
            self._flush(whole_members_only=False)
        self._finish_shard()
        return self.entries

    def abort(self) -> None:
        """Close the open file without finishing it."""
        if self._shard is not None:
            self._shard.file.close()
            self._shard = None

    def _flush(self, whole_members_only: bool) -> None:
        tokens, lengths = np.concatenate(self._tokens), np.concatenate(self._lengths)
        count = len(lengths) - len(lengths) % self._per_member if whole_members_only else len(lengths)
        edges = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        for first in range(0, count, self._per_member):
            last = min(first + self._per_member, count)
            self._write_member(tokens[edges[first] : edges[last]], lengths[first:last])
        self._tokens, self._lengths = [tokens[edges[count] :]], [lengths[count:]]
        self._waiting = len(lengths) - count

    def _write_member(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        if self._shard is not None and self._shard.position >= self._shard_bytes:
            self._finish_shard()
        if self._shard is None:
            self._shard = _OpenShard(self._root, f"{self._split}/shard-{len(self.entries):06d}")
        self._shard.add(tokens, lengths)

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self.entries.append(self._shard.finish())
            self._shard = None


class _OpenShard:
    """One tar being written, its running hash, and the index rows so far."""

    def __init__(self, root: Path, stem: str):
        self._root, self._stem = root, stem
        self.file = open(root / f"{stem}.tar", "wb")
        self._hash = hashlib.sha256()
        self._rows: list[np.ndarray] = []
        self._members = 0
        self.position = 0

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        name = f"{self._members:06d}"
        start = self._member(f"{name}.tokens.npy", tokens)
        self._member(f"{name}.lengths.npy", lengths)
        self._members += 1
        raw = memoryview(tokens.tobytes())
        edges = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]) * tokens.itemsize
        rows = np.empty(len(lengths), INDEX_DTYPE)
        rows["offset"] = start + edges[:-1]
        rows["length"] = lengths
        places = edges.tolist()
        rows["crc"] = [zlib.crc32(raw[first:last]) for first, last in zip(places, places[1:])]
        self._rows.append(rows)

    def finish(self) -> ShardEntry:
        self._put(b"\0" * 1024)
        self._put(b"\0" * (-self.position % tarfile.RECORDSIZE))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        rows = np.concatenate(self._rows)
        content = _npy_bytes(rows)
        with open(self._root / f"{self._stem}.idx.npy", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return ShardEntry(
            name=f"{self._stem}.tar",
            size=self.position,
            sha256=self._hash.hexdigest(),
            index=f"{self._stem}.idx.npy",
            index_size=len(content),
            index_sha256=hashlib.sha256(content).hexdigest(),
            sequences=len(rows),
            tokens=int(rows["length"].sum(dtype=np.int64)),
        )

    def _member(self, name: str, array: np.ndarray) -> int:
        """Append one member; byte offset of the array's first element in the tar."""
        content = _npy_bytes(array)
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode = len(content), 0, 0o644
        self._put(info.tobuf(tarfile.USTAR_FORMAT))
        start = self.position + len(content) - array.nbytes
        self._put(content)
        self._put(b"\0" * (-self.position % tarfile.BLOCKSIZE))
        return start

    def _put(self, content: bytes) -> None:
        self.file.write(content)
        self._hash.update(content)
        self.position += len(content)


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


@dataclass(frozen=True)
class BadRecord:
    """One damaged record: where it is, the crc32 the index has, the one read (-1: bytes missing), what stands in for
    it.
    """

    sample: int
    file: str
    offset: int
    expected: int
    got: int
    replacement: int


class ShardDataset:
    """Random access to one split of a prepared folder; every record is checked against its crc32 as it is read.

    A damaged record is replaced by a fixed other one of the same length, so that all ranks and restarts agree on the
    data and on every size that follows from the lengths, without talking to each other. Safe to use from several
    threads.
    """

    def __init__(self, folder: Path, split: str, manifest: dict, max_bad_records: float):
        self.path, self.split, self.manifest = folder, split, manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.domain: str = manifest["domain"]
        self.vocab_size: int = manifest["vocab_size"]
        self.max_length: int = manifest["max_length"]
        self.tokenizer_path = folder / TOKENIZER
        self.bad_records: list[BadRecord] = []
        self._max_bad = max_bad_records
        self._replacement: dict[int, bytes] = {}
        self._dtype = token_dtype(self.vocab_size)
        self._shards = manifest["splits"][split]["shards"]
        self._indexes = [_load_index(folder, shard) for shard in self._shards]
        self._starts = np.cumsum([0] + [len(index) for index in self._indexes], dtype=np.int64)
        self.lengths = np.concatenate([index["length"] for index in self._indexes]).astype(np.int32)
        self._files: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path | str, split: str, *, max_bad_records: float = 1e-4) -> ShardDataset:
        """Open `split` ('train' or 'valid') of the prepared folder `path`.

        Checks the manifest, that every shard has its recorded size, and the hash of every index; the payload is checked
        as it is read. `max_bad_records`: share of the split that may be damaged before `read` raises DataError.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {SPLITS}")
        shards = manifest["splits"][split]["shards"]
        if not shards:
            raise DataError(f"{folder}: its {split} split has no shards. Prepare the data again.")
        for shard in shards:
            _check_size(folder / shard["name"], shard["size"])
            _check_size(folder / shard["index"], shard["index_size"])
        return cls(folder, split, manifest, max_bad_records)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Payload ids of the samples `ids` [m]: (tokens int32 [sum of lengths], lengths int64 [m]), ragged, in the
        order asked.

        The lengths are `self.lengths[ids]`, also where a damaged record was replaced. Raises DataError above the
        budget.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"sample ids {ids.min()}..{ids.max()} outside [0, {len(self)})")
        with self._lock:
            payloads = self._payloads(ids)
        tokens = np.frombuffer(b"".join(payloads), dtype=self._dtype).astype(np.int32)
        return tokens, self.lengths[ids].astype(np.int64)

    def close(self) -> None:
        """Close the shard files; reading again reopens them."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def _payloads(self, ids: np.ndarray) -> list[bytes]:
        order = np.argsort(ids, kind="stable")
        ascending = ids[order]
        edges = np.searchsorted(ascending, self._starts)
        payloads: list[bytes] = [b""] * len(ids)
        for shard in np.flatnonzero(np.diff(edges)).tolist():
            group = slice(edges[shard], edges[shard + 1])
            self._read_shard(shard, ascending[group], order[group], payloads)
        return payloads

    def _read_shard(self, shard: int, ids: np.ndarray, places: np.ndarray, payloads: list[bytes]) -> None:
        rows = self._indexes[shard][ids - self._starts[shard]]
        sizes = rows["length"].astype(np.int64) * self._dtype.itemsize
        handle = self._handle(shard)
        pread, crc32 = os.pread, zlib.crc32
        wrong = []
        for place, offset, size, crc in zip(
            places.tolist(), rows["offset"].tolist(), sizes.tolist(), rows["crc"].tolist()
        ):
            content = pread(handle, size, offset)
            if len(content) != size or crc32(content) != crc:
                wrong.append(place)
            payloads[place] = content
        if wrong:
            sample_of = dict(zip(places.tolist(), ids.tolist()))
            for place in wrong:
                payloads[place] = self._replaced(sample_of[place])

    def _handle(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        path = self.path / self._shards[shard]["name"]
        try:
            self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be opened ({error.strerror}); it was there when the data was opened."
            ) from error
        return self._files[shard]

    def _attempt(self, sample: int) -> tuple[bytes, int, int]:
        """Read one record afresh, with the file reopened: (content, crc32 expected, crc32 got or -1 where bytes are
        missing).
        """
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        row = self._indexes[shard][sample - self._starts[shard]]
        if shard in self._files:
            os.close(self._files.pop(shard))
        size = int(row["length"]) * self._dtype.itemsize
        content = os.pread(self._handle(shard), size, int(row["offset"]))
        return content, int(row["crc"]), zlib.crc32(content) if len(content) == size else -1

    def _replaced(self, sample: int) -> bytes:
        """Bytes that stand in for a record whose checksum failed: the record itself if a second reading is right."""
        if sample in self._replacement:
            return self._replacement[sample]
        content, expected, got = self._attempt(sample)
        if got == expected:
            return content
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        name = str(self.path / self._shards[shard]["name"])
        offset = int(self._indexes[shard][sample - self._starts[shard]]["offset"])
        substitute, content = self._substitute(sample)
        event = BadRecord(sample, name, offset, expected, got, substitute)
        self.bad_records.append(event)
        self._replacement[sample] = content
        _log.warning("damaged record: %s", event)
        self._check_budget(event)
        return content

    def _substitute(self, sample: int) -> tuple[int, bytes]:
        """First record after `sample` (round the end) that is whole and of the same length; else of a greater length,
        cut.
        """
        size = int(self.lengths[sample]) * self._dtype.itemsize
        for candidates in (self.lengths == self.lengths[sample], self.lengths > self.lengths[sample]):
            found = np.flatnonzero(candidates)
            found = found[found != sample]
            for other in np.roll(found, -int(np.searchsorted(found, sample))).tolist():
                content, expected, got = self._attempt(other)
                if got == expected:
                    return other, content[:size]
        raise DataError(
            f"{self.path}: damaged record {sample} of split {self.split} and no whole record can stand in for it. "
            "Copy or prepare the data again."
        )

    def _check_budget(self, event: BadRecord) -> None:
        if len(self.bad_records) > self._max_bad * len(self):
            got = "bytes missing" if event.got < 0 else f"crc32 {event.got:08x}"
            raise DataError(
                f"{event.file}: record {event.sample} at byte {event.offset} is damaged (expected crc32 "
                f"{event.expected:08x}, {got}). {len(self.bad_records)} of {len(self)} records of split {self.split} "
                f"are damaged so far, more than data.max_bad_records = {self._max_bad:g} allows. "
                "Copy or prepare the data again, or raise the limit."
            )


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{path}: listed in {MANIFEST} but {error.strerror}. Copy or prepare the data again."
        ) from error
    if size != expected:
        raise DataError(
            f"{path}: {size} bytes, {expected} expected (cut off or altered). Copy or prepare the data again."
        )


def _load_index(folder: Path, shard: dict) -> np.ndarray:
    path = folder / shard["index"]
    if (digest := sha256_file(path)) != shard["index_sha256"]:
        raise DataError(
            f"{path}: sha256 {digest}, expected {shard['index_sha256']} (damaged). Copy or prepare the data again."
        )
    return np.load(path, mmap_mode="r", allow_pickle=False)
