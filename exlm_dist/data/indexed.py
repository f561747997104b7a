"""Shards that others wrote, read by an index of their records and tokenized on the way.

To all that reads it this is a `ShardDataset`: the same order, masks and packing, the same checks and replacements.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.data.manifest import MEMBERS, TOKENIZER, read_manifest
from exlm_dist.data.random_smiles import RandomSmiles
from exlm_dist.data.record_tokens import encoder_of
from exlm_dist.data.shards import ShardDataset, are_whole
from exlm_dist.utils.workers import WorkerPool

#: Seconds that the reading of a few hundred sequences may take, all attempts over a network included.
PATIENCE = 500.0
#: Sequences below which a worker process would cost more than it saves.
FEWEST = 32


class IndexedDataset(ShardDataset):
    """One split of a folder of `exlm data index`. A record is its bytes in the tar until its crc32 is right, then token
    ids; what stands in for a damaged one is chosen by lengths in tokens, as for prepared shards."""

    form = MEMBERS

    def __init__(
        self, folder: Path, split: str, manifest: dict[str, Any], max_bad_records: float, block: int, kept_blocks: int
    ):
        super().__init__(folder, split, manifest, max_bad_records, block, kept_blocks)
        random = RandomSmiles(**manifest.get("random_smiles", {}))
        self._encoder = encoder_of(str(folder / TOKENIZER), manifest["field"], self.max_length - 2, random)
        self._workers: WorkerPool | None = None
        self._retries_of_workers = 0

    def tokenize_in(self, pool: WorkerPool) -> None:
        """From now on read and tokenize in these processes, until `close`, which ends them."""
        self._workers = pool

    @property
    def retries(self) -> int:
        """How often something was read again, by workers too."""
        return super().retries + self._retries_of_workers

    def close(self) -> None:
        """Close the shard files and end the workers."""
        super().close()
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def read_whole(self, ids: np.ndarray) -> list[bytes | None]:
        """Token ids of the samples `ids` as bytes, of the type in which they are stored; None for a damaged one."""
        payloads: list[bytes | None] = [None] * len(ids)
        groups = [(*group, self.index.records(ids[group[1]], group[0])) for group in self.index.groups(ids)]
        if not groups:
            return payloads
        runs = [
            (shard, records["offset"].astype(np.int64), records["size"].astype(np.int64))
            for shard, _, records in groups
        ]
        contents = list(itertools.chain.from_iterable(self._files.read_each(runs)))
        rows, records = (np.concatenate(parts) for parts in list(zip(*groups))[1:])
        whole = are_whole(contents, records["size"], records["crc"])
        good = np.flatnonzero(whole)
        tokens, lengths = self._encoder.tokens(records[good], [contents[i] for i in good.tolist()])
        flat, ends = tokens.astype(self.dtype).tobytes(), (np.cumsum(lengths) * self.dtype.itemsize).tolist()
        for row, start, end in zip(rows[good].tolist(), [0, *ends], ends):
            payloads[row] = flat[start:end]
        return payloads

    def _preload_piece(self, shard: int, block: int) -> None:
        """Fetch what is behind an address. Nothing is kept in memory: between records a tar has what is never read."""
        rows = self._rows_of(shard, block)
        self._files.expect(shard, rows["offset"].astype(np.int64), rows["size"].astype(np.int64))

    def _payloads(self, ids: np.ndarray) -> tuple[list[bytes | memoryview], np.ndarray]:
        pool = self._workers
        if pool is None or len(ids) < 2 * FEWEST:
            found = self.read_whole(ids)
        else:
            found = [None] * len(ids)
            order = np.argsort(ids, kind="stable")
            parts = np.array_split(order, min(pool.workers, len(ids) // FEWEST))
            read = functools.partial(_read_in_worker, str(self.path), self.split)
            for rows, (payloads, retries) in zip(parts, pool.map(read, [ids[rows] for rows in parts], PATIENCE)):
                self._retries_of_workers += retries
                for row, payload in zip(rows.tolist(), payloads):
                    found[row] = payload
        whole: list[bytes | memoryview] = [
            self._replaced(sample) if payload is None else payload for sample, payload in zip(ids.tolist(), found)
        ]
        return whole, self.lengths[ids].astype(np.int64)

    def _attempt(self, sample: int) -> tuple[bytes, int, int]:
        """As in `ShardDataset`: the content is that of the tokens, the checksums are those of the record."""
        shard, record = self.record(sample)
        offset, size, expected = int(record["offset"]), int(record["size"]), int(record["crc"])
        self._files.forget(shard, offset, size)
        content = self._files.reader(shard)(size, offset)
        got = zlib.crc32(content) if len(content) == size else -1
        if got != expected:
            return b"", expected, got
        tokens, _ = self._encoder.tokens(self.index.rows(shard)[sample - self.index.starts[shard] :][:1], [content])
        return tokens.astype(self.dtype).tobytes(), expected, got


@functools.lru_cache(maxsize=64)
def _opened(folder: str, split: str) -> IndexedDataset:
    path = Path(folder)  # the ranks of the node have checked it
    return IndexedDataset(path, split, read_manifest(path), max_bad_records=1.0, block=0, kept_blocks=0)


def _read_in_worker(folder: str, split: str, ids: np.ndarray) -> tuple[list[bytes | None], int]:
    """In a worker process: `read_whole`, and how often it read again."""
    dataset = _opened(folder, split)
    before = dataset.retries
    return dataset.read_whole(ids), dataset.retries - before
