"""Shards of token sequences, WebDataset tars with many sequences per member and an index beside each, and their reader.

A shard `shard-000000.tar` holds pairs of members `000000.tokens.npy` (the concatenated ids of up to 512 sequences;
uint16 or uint32) and `000000.lengths.npy` (uint32). Its index `shard-000000.idx.npy` has one row per sequence: the byte
offset of its ids in the tar, how many there are, and the crc32 of their bytes. A tar has no checksums of its content,
and tar readers mistake many kinds of damage for the end of the archive, so the index is what defines the content.
"""

from __future__ import annotations

import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exlm_dist.data.manifest import MANIFEST, SPLITS, TOKENIZER, TOKENS, form_of, read_manifest
from exlm_dist.data.mirror import data_folder, local_shard, shard_root
from exlm_dist.data.shard_files import open_shards
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.files import sha256_file
from exlm_dist.utils.logs import get_logger

if TYPE_CHECKING:
    from typing_extensions import Self

INDEX_DTYPE = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc", "<u4")])
_log = get_logger(__name__)


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest unsigned type that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True)
class BadRecord:
    """A damaged record and what replaces it."""

    sample: int
    file: str
    offset: int  # bytes
    expected: int  # crc32 in the index
    got: int  # crc32 of what was read; -1: bytes missing
    replacement: int  # the sample read instead


class ShardDataset:
    """Random access to one split of a prepared folder; every record is checked against its crc32 as it is read.

    A damaged record is always replaced by the same other one of the same length, so that all ranks and restarts agree
    on the data, and on every size that follows from the lengths, without communication. Thread-safe.
    """

    form = TOKENS

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
        self._files = open_shards(shard_root(folder), self._shards)
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path | str, split: str, *, max_bad_records: float = 1e-4) -> Self:
        """Open `split` ('train' or 'valid') of the prepared folder `path`.

        Checks the manifest, the size of every shard and the hash of every index (DataError); the payload is checked as
        it is read. `max_bad_records`: fraction of the split that may be damaged before `read` raises DataError.
        """
        folder = data_folder(path)
        manifest = read_manifest(folder)
        if form_of(manifest) != cls.form:
            raise ValueError(f"{folder} holds {form_of(manifest)}: open it with `open_dataset`")
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {SPLITS}")
        shards = manifest["splits"][split]["shards"]
        if not shards:
            raise DataError(f"{folder}: its {split} split has no shards. Prepare the data again.")
        for shard in shards:
            if (local := local_shard(folder, shard["name"])) is not None:
                _check_size(local, shard["size"])
            _check_size(folder / shard["index"], shard["index_size"])
        return cls(folder, split, manifest, max_bad_records)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Payloads of the samples `ids` [m], in that order: (tokens int32 [sum of lengths], lengths int64 [m]).

        The lengths are `self.lengths[ids]` even where a damaged record was replaced. DataError if more than
        `max_bad_records` are damaged, IndexError for an unknown sample.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"sample ids {ids.min()}..{ids.max()} outside [0, {len(self)})")
        with self._lock:
            payloads = self._payloads(ids)
        tokens = np.frombuffer(b"".join(payloads), dtype=self._dtype).astype(np.int32)
        return tokens, self.lengths[ids].astype(np.int64)

    @property
    def retries(self) -> int:
        """How often something was read again."""
        return self._files.retries

    def record(self, sample: int) -> tuple[int, np.void]:
        """The shard of a sample, and its row in the index of that."""
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return shard, self._indexes[shard][sample - self._starts[shard]]

    def place(self, shard: int) -> str:
        """Path or address of a shard."""
        return self._files.place(shard)

    def raw(self, sample: int) -> tuple[bytes, int, int]:
        """The ids of a sample as bytes, read anew: (content, crc32 expected, crc32 got or -1 if bytes are missing)."""
        with self._lock:
            return self._attempt(sample)

    def close(self) -> None:
        """Close the shard files; reading again reopens them."""
        with self._lock:
            self._files.close()

    def _payloads(self, ids: np.ndarray) -> list[bytes]:
        order = np.argsort(ids, kind="stable")
        ascending = ids[order]
        edges = np.searchsorted(ascending, self._starts)
        payloads: list[bytes] = [b""] * len(ids)
        for shard in np.flatnonzero(np.diff(edges)).tolist():
            group = slice(edges[shard], edges[shard + 1])
            self._read_shard(shard, ascending[group], order[group], payloads)
        return payloads

    def _read_shard(self, shard: int, ids: np.ndarray, rows: np.ndarray, payloads: list[bytes]) -> None:
        """Read the samples `ids` of one shard into `payloads[rows]`."""
        records = self._indexes[shard][ids - self._starts[shard]]
        sizes = records["length"].astype(np.int64) * self._dtype.itemsize
        self._files.expect(shard, records["offset"].astype(np.int64), sizes)
        read, crc32 = self._files.reader(shard), zlib.crc32
        wrong = []
        for row, offset, size, crc in zip(
            rows.tolist(), records["offset"].tolist(), sizes.tolist(), records["crc"].tolist()
        ):
            content = read(size, offset)
            if len(content) != size or crc32(content) != crc:
                wrong.append(row)
            payloads[row] = content
        if wrong:
            sample_of = dict(zip(rows.tolist(), ids.tolist()))
            for row in wrong:
                payloads[row] = self._replaced(sample_of[row])

    def _attempt(self, sample: int) -> tuple[bytes, int, int]:
        """Reopen the file and read one record: (content, crc32 expected, crc32 got or -1 if bytes are missing)."""
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        record = self._indexes[shard][sample - self._starts[shard]]
        size = int(record["length"]) * self._dtype.itemsize
        self._files.forget(shard, int(record["offset"]), size)
        content = self._files.reader(shard)(size, int(record["offset"]))
        return content, int(record["crc"]), zlib.crc32(content) if len(content) == size else -1

    def _replaced(self, sample: int) -> bytes:
        """What to use for a record whose checksum failed: the record itself if a second read of it is intact."""
        if sample in self._replacement:
            return self._replacement[sample]
        content, expected, got = self._attempt(sample)
        if got == expected:
            return content
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        name = self._files.place(shard)
        offset = int(self._indexes[shard][sample - self._starts[shard]]["offset"])
        substitute, content = self._substitute(sample)
        event = BadRecord(sample, name, offset, expected, got, substitute)
        self.bad_records.append(event)
        self._replacement[sample] = content
        _log.warning("damaged record: %s", event)
        self._check_budget(event)
        return content

    def _substitute(self, sample: int) -> tuple[int, bytes]:
        """The first intact record after `sample` (wrapping around) of the same length; else a longer one, cut."""
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
