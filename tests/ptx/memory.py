"""Memory with bounds that also records who touched which address since the last barrier."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

#: Bytes per record of who touched them: the least that two threads may write next to each other.
UNIT = 2
#: Each tensor is in the middle of an address range of its own, so that an access beyond it hits no other tensor.
SHIFT = 40
_SEVERAL = -1


class MemoryFault(Exception):
    """An access outside a tensor or shared memory, or one that is not aligned to its own size."""


class Race(Exception):
    """Two warps touched one address, one of them writing, with no barrier between; or two blocks did at all."""


@dataclass(frozen=True)
class Moment:
    """The warp of every active thread (counted over all blocks), the block, and the barriers passed."""

    warps: np.ndarray
    block: int
    epoch: int


class Space:
    """Bytes at consecutive addresses from `base`, with the last writer and readers of each unit."""

    #: Called with every access: space, offsets, bytes at each, warps (`counts.py`).
    observer: Callable[[Space, np.ndarray, int, np.ndarray], None] | None = None

    def __init__(self, name: str, data: np.ndarray, base: int) -> None:
        self.name, self.base, self.size = name, base, len(data)
        self.data = data
        units = -(-self.size // UNIT)
        self.writer = np.full(units, -2, np.int64)
        self.write_epoch = np.zeros(units, np.int64)
        self.writing_block = np.full(units, -2, np.int64)
        self.reader = np.full(units, -2, np.int64)
        self.read_epoch = np.zeros(units, np.int64)
        self.reading_block = np.full(units, -2, np.int64)

    def load(self, addresses: np.ndarray, size: int, count: int, moment: Moment) -> np.ndarray:
        """[n, count] words of `size` bytes from `count` consecutive ones at each of n addresses."""
        offsets = self._offsets(addresses, size * count)
        if moment.epoch >= 0:
            self._read(offsets, size * count, moment)
            if Space.observer:
                Space.observer(self, offsets, size * count, moment.warps)
        return self.peek(offsets, size, count)

    def gather(self, addresses: np.ndarray, size: int, moment: Moment) -> np.ndarray:
        """Words [n] as the operand of a matrix product, which reads whole lines at a time."""
        offsets = self._offsets(addresses, size)
        self._read(offsets, size, moment)
        return self.peek(offsets, size, 1)[:, 0]

    def peek(self, offsets: np.ndarray, size: int, count: int) -> np.ndarray:
        """Words at offsets known to be inside."""
        return self._words(size)[(offsets // size)[:, None] + np.arange(count)]

    def store(self, addresses: np.ndarray, values: np.ndarray, moment: Moment) -> None:
        """Write [n, count] words at n addresses, `count` consecutive ones each."""
        size, count = values.dtype.itemsize, values.shape[1]
        offsets = self._offsets(addresses, size * count)
        index = (offsets // size)[:, None] + np.arange(count)
        words = self._words(size)
        changed = words[index] != values
        words[index] = values
        if moment.epoch >= 0:
            self._write(offsets, size * count, changed.any(1), moment)
            lost = (words[index] != self._winners(words, index, values, moment.warps)).any(1)
            units, warps = self._units(offsets[lost], size * count, moment.warps[lost])
            self._refuse(self.writer[units] != warps, units, warps, "written", self.writer)
            if Space.observer:
                Space.observer(self, offsets, size * count, moment.warps)

    @staticmethod
    def _winners(words: np.ndarray, index: np.ndarray, values: np.ndarray, warps: np.ndarray) -> np.ndarray:
        """What each warp alone would store. Lanes of one warp may collide, and one of them wins: a sum over a warp
        differs by rounding between its lanes where a product was fused with the addition of one side.
        """
        if (words[index] == values).all():
            return values
        out = np.empty_like(values)
        for warp in np.unique(warps):
            own = warps == warp
            words[index[own]] = values[own]
            out[own] = words[index[own]]
        return out

    def claim(self, addresses: np.ndarray, size: int, moment: Moment) -> None:
        """An asynchronous copy will write here from now on: nobody may still be reading it."""
        offsets = self._offsets(addresses, size)
        self._write(offsets, size, np.ones(len(offsets), bool), moment)

    def _words(self, size: int) -> np.ndarray:
        whole = self.size // size * size
        return self.data[:whole].view(f"u{size}")

    def _offsets(self, addresses: np.ndarray, size: int) -> np.ndarray:
        offsets = addresses.astype(np.int64) - self.base
        outside = (offsets < 0) | (offsets + size > self.size)
        if outside.any():
            raise MemoryFault(f"{self.name}: byte {offsets[outside][0]} of {self.size} ({size} bytes)")
        if (offsets % size).any():
            raise MemoryFault(f"{self.name}: byte {offsets[offsets % size != 0][0]} is not aligned to {size} bytes")
        return offsets

    @staticmethod
    def _units(offsets: np.ndarray, size: int, warps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        each = max(1, size // UNIT)
        return ((offsets // UNIT)[:, None] + np.arange(each)).ravel(), np.repeat(warps, each)

    def _read(self, offsets: np.ndarray, size: int, moment: Moment) -> None:
        units, warps = self._units(offsets, size, moment.warps)
        others = (self.writer[units] != warps) & (self.writer[units] != -2)
        block = self.writing_block[units]
        wrong = others & ((block != moment.block) | (self.write_epoch[units] == moment.epoch))
        self._refuse(wrong, units, warps, "read", self.writer)
        known = (self.read_epoch[units] == moment.epoch) & (self.reading_block[units] == moment.block)
        again = known & (self.reader[units] != warps)
        self.reader[units] = np.where(again, _SEVERAL, warps)
        # lanes of several warps in one instruction: one that lost the assignment above is a second reader
        lost = (self.reader[units] != warps) & (self.reader[units] != _SEVERAL)
        self.reader[units[lost]] = _SEVERAL
        self.read_epoch[units] = moment.epoch
        before = self.reading_block[units]
        self.reading_block[units] = np.where((before == -2) | (before == moment.block), moment.block, _SEVERAL)

    def _write(self, offsets: np.ndarray, size: int, changed: np.ndarray, moment: Moment) -> None:
        units, warps = self._units(offsets, size, moment.warps)
        changed = np.repeat(changed, max(1, size // UNIT))
        others = changed & (self.writer[units] != warps) & (self.writer[units] != -2)
        wrong = others & ((self.writing_block[units] != moment.block) | (self.write_epoch[units] == moment.epoch))
        self._refuse(wrong, units, warps, "written", self.writer)
        readers = changed & (self.reader[units] != warps) & (self.reader[units] != -2)
        foreign = self.reading_block[units] != moment.block
        wrong = readers & (foreign | (self.read_epoch[units] == moment.epoch))
        self._refuse(wrong, units, warps, "written", self.reader, "read")
        self.writer[units], self.write_epoch[units], self.writing_block[units] = warps, moment.epoch, moment.block

    def _refuse(
        self, wrong: np.ndarray, units: np.ndarray, warps: np.ndarray, verb: str, who: np.ndarray, did: str = "written"
    ) -> None:
        if not wrong.any():
            return
        first = int(np.flatnonzero(wrong)[0])
        other = int(who[units[first]])
        raise Race(
            f"{self.name}: byte {units[first] * UNIT} is {verb} by warp {warps[first]} and was {did} by "
            f"{'several warps' if other == _SEVERAL else f'warp {other}'} with no barrier between"
        )


class GlobalMemory:
    """The tensors of one launch, each a space of its own over the tensor's bytes."""

    def __init__(self) -> None:
        self.spaces: dict[int, Space] = {}
        self._numbers: dict[int, int] = {}

    def place(self, start: int, size: int, name: str) -> int:
        """The address that a kernel uses for the `size` bytes of this process at `start`."""
        number = self._numbers.setdefault(start, len(self._numbers) + 1)
        if number not in self.spaces:
            data = np.zeros(0, np.uint8)
            if size:
                data = np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8)
            self.spaces[number] = Space(name, data, (number << SHIFT) + (1 << SHIFT - 1))
        return self.spaces[number].base

    def load(self, addresses: np.ndarray, size: int, count: int, moment: Moment) -> np.ndarray:
        """As `Space.load`, from whichever tensors the addresses are in."""
        out = np.empty((len(addresses), count), f"u{size}")
        for space, chosen in self._owners(addresses):
            out[chosen] = space.load(addresses[chosen], size, count, _of(moment, chosen))
        return out

    def store(self, addresses: np.ndarray, values: np.ndarray, moment: Moment) -> None:
        """As `Space.store`."""
        for space, chosen in self._owners(addresses):
            space.store(addresses[chosen], values[chosen], _of(moment, chosen))

    def space(self, address: int) -> Space:
        """The tensor an address is in."""
        try:
            return self.spaces[int(address) >> SHIFT]
        except KeyError:
            raise MemoryFault(f"address {int(address):#x} is in no tensor of this launch") from None

    def _owners(self, addresses: np.ndarray):
        numbers = addresses >> np.uint64(SHIFT)
        for number in np.unique(numbers):
            chosen = numbers == number
            yield self.space(int(number) << SHIFT), chosen


def _of(moment: Moment, chosen: np.ndarray) -> Moment:
    return Moment(moment.warps[chosen], moment.block, moment.epoch)
