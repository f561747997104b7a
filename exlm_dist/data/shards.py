"""Shards of token sequences, WebDataset tars with many sequences per member and an index beside each, and their reader.

A shard `shard-000000.tar` holds pairs of members `000000.tokens.npy` (the concatenated ids of up to 512 sequences;
uint16 or uint32) and `000000.lengths.npy` (uint32). Its index `shard-000000.idx.npy` has one row per sequence: the byte
offset of its ids in the tar, how many there are, and the crc32 of their bytes. A tar has no checksums of its content,
and tar readers mistake many kinds of damage for the end of the archive, so the index is what defines the content.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exlm_dist.data.blocks import Blocks
from exlm_dist.data.manifest import SPLITS, TOKENIZER, TOKENS, epoch_size, form_of, forms_of, read_manifest
from exlm_dist.data.mirror import data_folder, shard_root
from exlm_dist.data.shard_files import open_shards
from exlm_dist.data.shard_index import ShardIndex
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.logs import get_logger

if TYPE_CHECKING:
    from typing_extensions import Self

INDEX_DTYPE = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc", "<u4")])
#: A range of a shard: its first byte, and its content.
Piece = tuple[int, memoryview]
_log = get_logger(__name__)


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest unsigned type that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def are_whole(contents: Sequence[bytes | memoryview], sizes: np.ndarray, crcs: np.ndarray) -> np.ndarray:
    """bool[m]: whether each content has the size and the crc32 that it should have."""
    whole = np.fromiter(map(zlib.crc32, contents), np.uint32, len(contents)) == crcs
    return whole & (np.fromiter(map(len, contents), np.int64, len(contents)) == sizes)


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

    def __init__(self, folder: Path, split: str, manifest: dict, max_bad_records: float, block: int, kept_blocks: int):
        self.path, self.split, self.manifest = folder, split, manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.domain: str = manifest["domain"]
        self.vocab_size: int = manifest["vocab_size"]
        self.max_length: int = manifest["max_length"]
        self.tokenizer_path = folder / TOKENIZER
        self.forms, self.epoch_size = forms_of(manifest["splits"][split]), epoch_size(manifest["splits"][split])
        self.bad_records: list[BadRecord] = []
        self.index = ShardIndex(folder, manifest["splits"][split])
        self.lengths = self.index.lengths
        self._max_bad = max_bad_records
        self._replacement: dict[int, bytes] = {}
        self.dtype = token_dtype(self.vocab_size)
        self._shards = manifest["splits"][split]["shards"]
        self._blocks = Blocks(block, self.epoch_size, self.forms) if block else None
        self._kept_blocks = kept_blocks
        self._pieces: dict[tuple[int, int], Piece] = {}  # by shard and block, the longest in memory first
        self._files = open_shards(shard_root(folder), self._shards)
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        path: Path | str,
        split: str,
        *,
        max_bad_records: float = 1e-4,
        block: int = 0,
        kept_blocks: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> Self:
        """Open `split` ('train' or 'valid') of the prepared folder `path`.

        Checks the manifest, the size of every shard and the hash of every index (DataError); the payload is checked as
        it is read. Processes of one node divide that work: this one, number `part[0]` of `part[1]`, checks every
        `part[1]`-th shard. `max_bad_records`: fraction of the split that may be damaged before `read` raises
        DataError. With `block`, samples are read in blocks of as many, and the last `kept_blocks` read are kept in
        memory: for an order in windows (`order.py`), which needs two windows of them. Without it each sample is read
        for itself.
        """
        folder = data_folder(path)
        manifest = read_manifest(folder)
        if form_of(manifest) != cls.form:
            raise ValueError(f"{folder} holds {form_of(manifest)}: open it with `open_dataset`")
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {SPLITS}")
        if not manifest["splits"][split]["shards"]:
            raise DataError(f"{folder}: its {split} split has no shards. Prepare the data again.")
        dataset = cls(folder, split, manifest, max_bad_records, block, kept_blocks)
        dataset.index.verify(*part)
        return dataset

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Payloads of the samples `ids` [m], in that order: (tokens int32 [sum of lengths], lengths int64 [m]).

        The lengths are `self.lengths[ids]` even where a damaged record was replaced. DataError if more than
        `max_bad_records` are damaged, IndexError for an unknown sample.
        """
        payloads, lengths = self.payloads(ids)
        return np.frombuffer(b"".join(payloads), dtype=self.dtype).astype(np.int32), lengths

    def payloads(self, ids: np.ndarray) -> tuple[list[bytes | memoryview], np.ndarray]:
        """What `read` returns, the tokens as a list of bytes, of type `dtype`, for each sample."""
        ids = np.asarray(ids, dtype=np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"sample ids {ids.min()}..{ids.max()} outside [0, {len(self)})")
        with self._lock:
            return self._payloads(ids)

    def preload(self, blocks: list[int]) -> None:
        """Read blocks that will be needed soon, as `Blocks` numbers them."""
        assert self._blocks is not None, "only an order in windows reads blocks ahead"
        with self._lock:
            for block in blocks:
                first, stop = self._blocks.bounds(block)
                for shard in range(self.index.shard_of(first), self.index.shard_of(stop - 1) + 1):
                    self._preload_piece(shard, block)

    @property
    def num_blocks(self) -> int:
        """Blocks in which the samples are read."""
        return len(self._blocks) if self._blocks else 0

    @property
    def retries(self) -> int:
        """How often something was read again."""
        return self._files.retries

    def record(self, sample: int) -> tuple[int, np.void]:
        """The shard of a sample, and its row in the index of that."""
        return self.index.shard_of(sample), self.index.record(sample)

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

    def _payloads(self, ids: np.ndarray) -> tuple[list[bytes | memoryview], np.ndarray]:
        """Token ids of the samples `ids` [m] as bytes, and the lengths int64 [m]."""
        payloads: list[bytes | memoryview] = [b""] * len(ids)
        lengths = np.empty(len(ids), np.int64)
        groups = [(*group, self.index.records(ids[group[1]], group[0])) for group in self.index.groups(ids)]
        runs = [
            (shard, records["offset"].astype(np.int64), records["length"].astype(np.int64) * self.dtype.itemsize)
            for shard, _, records in groups
        ]
        found: Sequence[Sequence[bytes | memoryview]]
        if self._blocks is not None:
            found = [self._from_blocks(ids[rows], *run) for (_, rows, _), run in zip(groups, runs)]
        else:
            found = self._files.read_each(runs)
        for (_, rows, records), (_, _, sizes), contents in zip(groups, runs, found):
            lengths[rows] = records["length"]
            for row, content in zip(rows.tolist(), contents):
                payloads[row] = content
            for wrong in np.flatnonzero(~are_whole(contents, sizes, records["crc"])).tolist():
                payloads[rows[wrong]] = self._replaced(int(ids[rows[wrong]]))
        return payloads, lengths

    def _from_blocks(self, ids: np.ndarray, shard: int, offsets: np.ndarray, sizes: np.ndarray) -> list[memoryview]:
        """The bytes at each offset of a shard, where the samples `ids` are, as many as there are up to each size."""
        assert self._blocks is not None, "without blocks samples are read one by one"
        blocks = self._blocks.of(ids).tolist()
        try:
            pieces = [self._pieces[shard, block] for block in blocks]
        except KeyError:
            self._fetch([(shard, block) for block in dict.fromkeys(blocks)])
            pieces = [self._piece(shard, block) for block in blocks]
        begins = (offsets - np.fromiter((start for start, _ in pieces), np.int64, len(pieces))).tolist()
        ends = (sizes + begins).tolist()
        return [content[begin:end] for (_, content), begin, end in zip(pieces, begins, ends)]

    def _piece(self, shard: int, block: int) -> Piece:
        """What one shard has of a block, from memory or else from its file."""
        if (shard, block) not in self._pieces:
            self._fetch([(shard, block)])
        return self._pieces[shard, block]

    def _preload_piece(self, shard: int, block: int) -> None:
        piece = self._piece(shard, block)
        del self._pieces[shard, block]
        self._pieces[shard, block] = piece  # the last of those that make room

    def _rows_of(self, shard: int, block: int) -> np.ndarray:
        """The rows of the index that one shard has of a block."""
        assert self._blocks is not None, "without blocks samples are read one by one"
        start, end = self.index.starts[shard : shard + 2].tolist()
        first, stop = self._blocks.bounds(block)
        return self.index.rows(shard)[max(first, start) - start : min(stop, end) - start]

    def _fetch(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Read those of the pieces, each of a shard and a block, that are not in memory, and make room for them."""
        missing = [piece for piece in wanted if piece not in self._pieces]
        if not missing:
            return
        runs = []
        for shard, block in missing:
            rows = self._rows_of(shard, block)
            begin, tail = int(rows[0]["offset"]), rows[-1]
            size = int(tail["offset"]) + int(tail["length"]) * self.dtype.itemsize - begin
            runs.append((shard, np.array([begin]), np.array([size])))
        for piece, (_, begins, _), (content,) in zip(missing, runs, self._files.read_each(runs)):
            while len(self._pieces) >= self._kept_blocks + len(self._shards):  # of some blocks two shards have a piece
                self._pieces.pop(next(iter(self._pieces)))
            self._pieces[piece] = int(begins[0]), memoryview(content)

    def _attempt(self, sample: int) -> tuple[bytes, int, int]:
        """Reopen the file and read one record: (content, crc32 expected, crc32 got or -1 if bytes are missing)."""
        shard, record = self.record(sample)
        size = int(record["length"]) * self.dtype.itemsize
        self._files.forget(shard, int(record["offset"]), size)
        content = self._files.reader(shard)(size, int(record["offset"]))
        return content, int(record["crc"]), zlib.crc32(content) if len(content) == size else -1

    def _replaced(self, sample: int) -> bytes:
        """What to use for a record whose checksum failed: the record itself if a second read of it is intact."""
        if sample in self._replacement:
            return self._replacement[sample]
        shard, record = self.record(sample)
        if self._blocks is not None:
            (block,) = self._blocks.of(np.array([sample])).tolist()
            self._pieces.pop((shard, block), None)  # it may be whole when it is read again
        content, expected, got = self._attempt(sample)
        if got == expected:
            return content
        name, offset = self.place(shard), int(record["offset"])
        substitute, content = self._substitute(sample)
        event = BadRecord(sample, name, offset, expected, got, substitute)
        self.bad_records.append(event)
        self._replacement[sample] = content
        _log.warning("damaged record: %s", event)
        self._check_budget(event)
        return content

    def _substitute(self, sample: int) -> tuple[int, bytes]:
        """The first intact record after `sample` (wrapping around) of the same length; else a longer one, cut."""
        size = int(self.index.record(sample)["length"]) * self.dtype.itemsize
        for other in self.index.substitutes(sample):
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
