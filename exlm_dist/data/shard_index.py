"""The index of a split: what is where in its shards, mapped from its files, so that ranks use what their node has read.

An index is opened when a sample of its shard is first asked for; nothing here is proportional to the number of samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.data.manifest import MANIFEST
from exlm_dist.data.mirror import local_shard
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.files import sha256_file

AGAIN = "Copy or prepare the data again."


class ShardIndex:
    """Records of the samples of one split, `manifest["splits"][name]`, in the prepared folder `folder`.

    `starts` int64[number of shards + 1]: the first sample of each shard, and the number of samples.
    """

    def __init__(self, folder: Path, split: dict[str, Any]):
        self._folder, self._shards = folder, split["shards"]
        self._histogram = split.get("length_histogram")
        self._maps: dict[int, np.ndarray] = {}
        self.starts = np.cumsum([0] + [shard["sequences"] for shard in self._shards], dtype=np.int64)
        self.lengths = Lengths([self])

    def verify(self, part: int, parts: int) -> None:
        """Check sizes of local shards and index files, and hashes of index files, of every `parts`-th
        shard from `part` on.

        DataError for the first that is missing or not as the manifest says.
        """
        for shard in self._shards[part::parts]:
            if (local := local_shard(self._folder, shard["name"])) is not None:
                _check_size(local, shard["size"])
            _check_size(path := self._folder / shard["index"], shard["index_size"])
            if (digest := sha256_file(path)) != shard["index_sha256"]:
                raise DataError(f"{path}: sha256 {digest}, expected {shard['index_sha256']} (damaged). {AGAIN}")

    def shard_of(self, sample: int) -> int:
        """The shard that has a sample."""
        return int(np.searchsorted(self.starts, sample, side="right")) - 1

    def rows(self, shard: int) -> np.ndarray:
        """The index of a shard, mapped: a structured array with a row (offset, length, crc, ...) for each sample."""
        if shard not in self._maps:
            path = self._folder / self._shards[shard]["index"]
            try:
                rows = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{path}: cannot be read ({error}); it was whole when the data was opened. {AGAIN}"
                ) from error
            if len(rows) != self._shards[shard]["sequences"]:
                raise DataError(f"{path}: {len(rows)} rows, {self._shards[shard]['sequences']} expected. {AGAIN}")
            self._maps[shard] = rows
        return self._maps[shard]

    def record(self, sample: int) -> np.void:
        """The row of one sample."""
        shard = self.shard_of(sample)
        return self.rows(shard)[sample - self.starts[shard]]

    def records(self, ids: np.ndarray, shard: int) -> np.ndarray:
        """The rows of the samples `ids` (int64[m]), all of one shard."""
        return self.rows(shard)[ids - self.starts[shard]]

    def groups(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(shard, which of `ids` [m] are in it, by ascending id) for each shard that has any."""
        return grouped(ids, self.starts)

    def substitutes(self, sample: int) -> Iterator[int]:
        """Samples that can stand in for one: those of its length that follow it (wrapping around), then longer ones."""
        length, own = self.record(sample)["length"], self.shard_of(sample)
        count = len(self._shards)
        for matches in (np.equal, np.greater):
            for turn in range(count + 1):
                shard = (own + turn) % count
                found = np.flatnonzero(matches(self.rows(shard)["length"], length)) + self.starts[shard]
                if turn == 0:
                    found = found[found > sample]
                elif turn == count:
                    found = found[found < sample]
                yield from found.tolist()

    def length_bounds(self) -> tuple[int, int]:
        """The smallest and the largest length; from the manifest, or, where it lacks them, from all rows."""
        if self._histogram is not None:
            present = np.flatnonzero(self._histogram) - 2  # it counts BOS and EOS
        else:
            present = np.concatenate([np.unique(self.rows(shard)["length"]) for shard in range(len(self._shards))])
        return int(present.min()), int(present.max())

    @property
    def tokens(self) -> int:
        """The sum of all lengths."""
        return sum(shard["tokens"] for shard in self._shards)


def grouped(ids: np.ndarray, starts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(part, which of `ids` [m] are in it, by ascending id) for each part that has any; part i has the ids from
    starts[i] to starts[i + 1] (int64[number of parts + 1])."""
    order = np.argsort(ids, kind="stable")
    edges = np.searchsorted(ids[order], starts)
    for part in np.flatnonzero(np.diff(edges)).tolist():
        yield part, order[edges[part] : edges[part + 1]]


class Lengths:
    """Payload lengths of the samples of one index, or of several one after another, as an array would give them:
    `lengths[ids]`, `lengths[:10]`, `min`, `max`, and `lengths * 2`, those of samples that are `times` 2 as long."""

    def __init__(self, indexes: Sequence[ShardIndex], times: int = 1):
        self._indexes, self._times = indexes, times
        self._shards = [(index, shard) for index in indexes for shard in range(len(index.starts) - 1)]
        self._starts = np.cumsum(np.concatenate([[0], *(np.diff(index.starts) for index in indexes)]), dtype=np.int64)
        self._bounds: tuple[int, int] | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, ids: np.ndarray | slice) -> np.ndarray:
        """int32[m]: lengths of the samples `ids` (int64[m], or a slice)."""
        if isinstance(ids, slice):
            ids = np.arange(*ids.indices(len(self)))
        result = np.empty(len(ids), np.int32)
        for position, where in grouped(ids, self._starts):
            index, shard = self._shards[position]
            result[where] = index.rows(shard)["length"][ids[where] - self._starts[position]]
        return result * self._times

    def __mul__(self, times: int) -> Lengths:
        return Lengths(self._indexes, self._times * times)

    def min(self) -> int:
        """The smallest length."""
        return self._known_bounds()[0]

    def max(self, initial: int = 0) -> int:
        """The largest length, at least `initial`."""
        return max(initial, self._known_bounds()[1])

    def mean(self) -> float:
        """The mean length."""
        return sum(index.tokens for index in self._indexes) / len(self) * self._times

    def _known_bounds(self) -> tuple[int, int]:
        if self._bounds is None:
            least, most = zip(*(index.length_bounds() for index in self._indexes))
            self._bounds = min(least) * self._times, max(most) * self._times
        return self._bounds


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: listed in {MANIFEST} but {error.strerror}. {AGAIN}") from error
    if size != expected:
        raise DataError(f"{path}: {size} bytes, {expected} expected (cut off or altered). {AGAIN}")
