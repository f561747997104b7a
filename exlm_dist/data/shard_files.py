"""The open shards of a split, here or over the network: `reader` gives the function that reads a run of bytes."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np

from exlm_dist.data.block_cache import BlockCache, cache_folder, cache_limit, key_of
from exlm_dist.data.places import address_of, joined
from exlm_dist.data.remote import Remote, in_background
from exlm_dist.utils.errors import DataError

Result = TypeVar("Result")
OPEN_FILES = 128
#: Bytes of a block, in which remote shards are fetched and cached, and blocks that are fetched at a time.
BLOCK, AT_A_TIME = 4 << 20, 8
#: (size, offset) -> the bytes; fewer if the shard ends before.
Reader: TypeAlias = Callable[[int, int], bytes]
#: Runs of bytes of one shard: its number, offsets int64 [m], sizes int64 [m].
Runs: TypeAlias = tuple[int, np.ndarray, np.ndarray]
#: Where the first PROBED calls took longer than SLOW seconds each, the others are made by THREADS threads.
PROBED, SLOW, THREADS = 4, 2e-4, 16


class ShardFiles(Protocol):
    """What a data set reads its shards through; shards are known by their number."""

    @property
    def retries(self) -> int:
        """Times that something was asked for again."""
        ...

    def place(self, shard: int) -> str:
        """Path or address."""
        ...

    def reader(self, shard: int) -> Reader:
        """The function that reads a run of bytes of the shard."""
        ...

    def read_each(self, runs: Sequence[Runs]) -> list[list[bytes]]:
        """The runs of bytes of several shards, each fewer bytes if the shard ends before."""
        ...

    def expect(self, shard: int, offsets: np.ndarray, sizes: np.ndarray) -> None:
        """What will be read next, so that it can be fetched at once."""
        ...

    def forget(self, shard: int, offset: int, size: int) -> None:
        """These bytes were not as expected: get them anew next time."""
        ...

    def close(self) -> None:
        """Close all files; reading again reopens them."""
        ...


def open_shards(root: str, shards: Sequence[dict[str, Any]]) -> ShardFiles:
    """The shards of a manifest, whose names are relative to the folder or address `root`."""
    places = [joined(root, shard["name"]) for shard in shards]
    if any(address_of(place) for place in places):
        return RemoteShards(places, shards)
    return LocalShards(places)


class LocalShards:
    """Files of this machine, at most `OPEN_FILES` of them open."""

    def __init__(self, places: Sequence[str]):
        self._places = places
        self._files: OrderedDict[int, int] = OrderedDict()
        self._retries = 0

    @property
    def retries(self) -> int:
        return self._retries

    def place(self, shard: int) -> str:
        return self._places[shard]

    def reader(self, shard: int) -> Reader:
        return partial(os.pread, self._handle(shard))

    def read_each(self, runs: Sequence[Runs]) -> list[list[bytes]]:
        found: list[list[bytes]] = []
        for first in range(0, len(runs), OPEN_FILES):
            found += self._read_open(runs[first : first + OPEN_FILES])
        return found

    def _read_open(self, runs: Sequence[Runs]) -> list[list[bytes]]:
        """Runs of at most `OPEN_FILES` shards, which are all open meanwhile."""
        self._open(list(dict.fromkeys(shard for shard, _, _ in runs)))
        counts = [len(offsets) for _, offsets, _ in runs]
        handles = [handle for (shard, _, _), count in zip(runs, counts) for handle in [self._files[shard]] * count]
        sizes = [size for _, _, sizes in runs for size in sizes.tolist()]
        offsets = [offset for _, offsets, _ in runs for offset in offsets.tolist()]
        contents = iter(each(os.pread, handles, sizes, offsets))
        return [list(islice(contents, count)) for count in counts]

    def expect(self, shard: int, offsets: np.ndarray, sizes: np.ndarray) -> None:
        return

    def forget(self, shard: int, offset: int, size: int) -> None:
        self._retries += 1
        if shard in self._files:
            os.close(self._files.pop(shard))

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _handle(self, shard: int) -> int:
        self._open([shard])
        return self._files[shard]

    def _open(self, shards: Sequence[int]) -> None:
        """Open those that are not, and close others, used longest ago, if there are too many."""
        missing = []
        for shard in shards:
            if shard in self._files:
                self._files.move_to_end(shard)
            else:
                missing.append(shard)
        while self._files and len(self._files) + len(missing) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        opened = each(_opened, [self._places[shard] for shard in missing])
        self._files.update((shard, handle) for shard, handle in zip(missing, opened) if isinstance(handle, int))
        for error in opened:
            if isinstance(error, DataError):
                raise error


def _opened(path: str) -> int | DataError:
    """A descriptor; an error as a value, so that no descriptor of other threads is lost."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return DataError(f"{path}: cannot be opened ({error.strerror}); it was there when the data was opened.")


def each(function: Callable[..., Result], *columns: Sequence[Any]) -> list[Result]:
    """`function` of each row of the `columns`, in order. If storage is slow, several threads wait for it side by side;
    if it is not, or has the files in memory, threads would cost more than they save."""
    start = time.perf_counter()
    found = list(map(function, *(column[:PROBED] for column in columns)))
    rest = [column[PROBED:] for column in columns]
    if time.perf_counter() - start < SLOW * PROBED:
        return found + list(map(function, *rest))
    count = len(rest[0])
    parts = [
        in_background(partial(_listed, function, [column[first::THREADS] for column in rest]))
        for first in range(min(THREADS, count))
    ]
    others: list[Any] = [None] * count
    for first, part in enumerate(parts):
        others[first::THREADS] = part()
    return found + others


def _listed(function: Callable[..., Result], columns: list[Sequence[Any]]) -> list[Result]:
    return list(map(function, *columns))


class RemoteShards:
    """Shards read over the network in whole blocks, through a cache on the node's disk."""

    def __init__(self, places: Sequence[str], shards: Sequence[dict[str, Any]], remote: Remote | None = None):
        self._places = places
        self._sizes = [int(shard["size"]) for shard in shards]
        self._keys = [key_of(place, shard["size"], shard["sha256"]) for place, shard in zip(places, shards)]
        self._cache = BlockCache(cache_folder(), cache_limit())
        self._remote = remote or Remote()
        self._open: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._ahead: OrderedDict[tuple[int, int], Callable[[], None]] = OrderedDict()
        self._forgotten = 0
        self._lock = threading.RLock()

    @property
    def retries(self) -> int:
        return self._remote.retries + self._forgotten

    def place(self, shard: int) -> str:
        return self._places[shard]

    def reader(self, shard: int) -> Reader:
        return partial(self._read, shard)

    def read_each(self, runs: Sequence[Runs]) -> list[list[bytes]]:
        found = []
        for shard, offsets, sizes in runs:
            self.expect(shard, offsets, sizes)
            found.append(list(map(self.reader(shard), sizes.tolist(), offsets.tolist())))
        return found

    def expect(self, shard: int, offsets: np.ndarray, sizes: np.ndarray) -> None:
        """Fetch the blocks that these runs of bytes are in, several at a time, and begin with the one after them."""
        if len(offsets) == 0:
            return
        first, last = offsets // BLOCK, (offsets + np.maximum(sizes, 1) - 1) // BLOCK
        blocks = sorted({block for low, high in zip(first.tolist(), last.tolist()) for block in range(low, high + 1)})
        missing = [block for block in blocks if not self._is_here(shard, block)]
        for start in range(0, len(missing), AT_A_TIME):
            results = [self._started(shard, block) for block in missing[start : start + AT_A_TIME]]
            for result in results:
                result()
        after = blocks[-1] + 1
        if missing and after * BLOCK < self._sizes[shard] and not self._is_here(shard, after):
            self._ahead[shard, after] = self._started(shard, after)
            while len(self._ahead) > AT_A_TIME:
                self._ahead.popitem(last=False)

    def forget(self, shard: int, offset: int, size: int) -> None:
        self._forgotten += 1
        for block in range(offset // BLOCK, (offset + max(size, 1) - 1) // BLOCK + 1):
            self._close_block(shard, block)
            self._cache.drop(self._keys[shard], block)

    def close(self) -> None:
        for shard, block in list(self._open):
            self._close_block(shard, block)

    def _started(self, shard: int, block: int) -> Callable[[], None]:
        """Fetching a block in the background, begun now or earlier; calling it waits for the end."""
        return self._ahead.pop((shard, block), None) or in_background(partial(self._fetch, shard, block))

    def _fetch(self, shard: int, block: int) -> None:
        start, size = block * BLOCK, self._sizes[shard]
        content = self._remote.read(self._places[shard], start, min(start + BLOCK, size), size)
        with self._lock:
            self._cache.put(self._keys[shard], block, content)

    def _is_here(self, shard: int, block: int) -> bool:
        return self._block(shard, block) is not None

    def _block(self, shard: int, block: int) -> int | None:
        """A file descriptor of the block if it is in the cache."""
        key = (shard, block)
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        size = min(BLOCK, self._sizes[shard] - block * BLOCK)
        handle = self._cache.open(self._keys[shard], block, size)
        if handle is not None:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[key] = handle
        return handle

    def _close_block(self, shard: int, block: int) -> None:
        if (handle := self._open.pop((shard, block), None)) is not None:
            os.close(handle)

    def _read(self, shard: int, size: int, offset: int) -> bytes:
        parts = []
        end = min(offset + size, self._sizes[shard])
        while offset < end:
            block, within = divmod(offset, BLOCK)
            handle = self._block(shard, block)
            if handle is None:  # evicted since, or never expected
                self._fetch(shard, block)
                handle = self._block(shard, block)
            if handle is None:
                raise DataError(
                    f"{self._places[shard]}: a block was evicted from the cache before it could be read: "
                    "set EXLM_CACHE_GB to more."
                )
            part = os.pread(handle, min(end - offset, BLOCK - within), within)
            if not part:
                break
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
