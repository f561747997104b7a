"""Writes token sequences into the shards that `exlm_dist.data.shards` reads; the format is described there."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np

from exlm_dist.data.manifest import ShardEntry
from exlm_dist.data.shards import INDEX_DTYPE, token_dtype
from exlm_dist.tokenizers.tokenizer import NUM_SPECIAL, UNK


class ShardWriter:
    """Writes ragged batches of payload ids (no BOS, no EOS) to numbered shards in `root/split`.

    The bytes depend on the sequences alone: owner, mode and time are the same in every header. `close` flushes every
    file to disk and returns the entries for the manifest.
    """

    def __init__(self, root: Path, split: str, *, vocab_size: int, shard_bytes: int = 64 << 20, per_member: int = 512):
        self._root, self._split = Path(root), split
        self._dtype = token_dtype(vocab_size)
        self._vocab_size, self._shard_bytes, self._per_member = vocab_size, shard_bytes, per_member
        self._tokens: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._pending = 0
        self._shard: _OpenShard | None = None
        self.entries: list[ShardEntry] = []
        (self._root / split).mkdir(parents=True, exist_ok=True)

    def write(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append sequences: `tokens` [sum of lengths] ids, `lengths` [m], each at least 1. ValueError otherwise."""
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
        self._pending += len(lengths)
        if self._pending >= self._per_member:
            self._flush(whole_members_only=True)

    def close(self) -> list[ShardEntry]:
        """Write the pending sequences, finish the last shard, and return the entries of all shards in order."""
        if self._pending:
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
        self._pending = len(lengths) - count

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
        bounds = edges.tolist()
        rows["crc"] = [zlib.crc32(raw[first:last]) for first, last in zip(bounds, bounds[1:])]
        self._rows.append(rows)

    def finish(self) -> ShardEntry:
        self._put(b"\0" * 1024)
        self._put(b"\0" * (-self.position % tarfile.RECORDSIZE))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        rows = np.concatenate(self._rows)
        content = npy_bytes(rows)
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
        content = npy_bytes(array)
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


def npy_bytes(array: np.ndarray) -> bytes:
    """`array` as the content of a .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
