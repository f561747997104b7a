"""Tile sizes of the attention kernels: a fixed table, chosen by head width, type and GPU; nothing is timed at run time.

Which tiles compute a sequence depends on nothing but its own length (and the table), so a sequence's values do not
change with the other sequences of its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

UNLIMITED = 2**31 - 1
#: Up to this length keys are rotated where they are read; rotating them beforehand costs a pass over the memory.
SHORT = 256


@dataclass(frozen=True)
class Tiles:
    """Tile of one kernel: `queries` x `keys`; a program of the forward kernel keeps `resident` query tiles."""

    queries: int
    keys: int
    resident: int
    warps: int
    stages: int = 1
    registers: int | None = None


@dataclass(frozen=True)
class Range:
    """Tiles for the sequences with lower < tokens <= upper; `rotated`: their keys are rotated by a kernel before."""

    lower: int
    upper: int
    tiles: Tiles
    rotated: bool = False


@dataclass(frozen=True)
class Plan:
    """For each kernel its ranges, which cover every length from 1."""

    forward: list[Range]
    queries: list[Range]
    keys: list[Range]


def _all(tiles: Tiles) -> list[Range]:
    return [Range(0, UNLIMITED, tiles)]


def plan(width: int, itemsize: int, dropout: bool, capability: tuple[int, int]) -> Plan:
    """The tiles for heads of `width`, elements of `itemsize` bytes and a GPU of this compute capability."""
    if itemsize == 4:
        # no tensor cores: for checks, not for speed
        exact = _all(Tiles(16, 16, 1, 4 if width < 64 else 8))
        return Plan(exact, exact, exact)
    if width > 64:
        return _wide(capability)
    return _narrow(dropout, capability)


def _narrow(dropout: bool, capability: tuple[int, int]) -> Plan:
    """Half precision, heads of at most 64: the short form measured on an H100 (benchmarks/results).

    The long form's tiles were chosen by registers and instructions in the machine code, not measured: three programs of
    four warps, or two of eight, fit on a multiprocessor, and loads run a tile ahead.
    """
    square = Tiles(64, 64, 1, 4)
    if capability < (9, 0):
        return Plan(_all(square), _all(Tiles(64, 32, 1, 4)), _all(Tiles(32, 64, 1, 4)))
    ahead = Tiles(64, 64, 1, 4, stages=2, registers=168 if capability < (10, 0) else None)
    forward = [
        Range(0, 128, Tiles(64, 64, 2, 4)),
        Range(128, SHORT, Tiles(64, 64, 3, 4)),
        Range(SHORT, UNLIMITED, ahead if dropout else Tiles(128, 64, 1, 8, stages=2), rotated=True),
    ]
    queries = [Range(0, SHORT, square), Range(SHORT, UNLIMITED, ahead, rotated=True)]
    return Plan(forward, queries, _all(square))


def _wide(capability: tuple[int, int]) -> Plan:
    """Half precision, heads of 96 and 128: chosen so that nothing spills, not measured."""
    if capability < (9, 0):
        return Plan(_all(Tiles(64, 32, 1, 8)), _all(Tiles(32, 32, 1, 8)), _all(Tiles(32, 64, 1, 8)))
    queries = Tiles(64, 64 if capability < (10, 0) else 32, 1, 8)
    return Plan(_all(Tiles(128, 64, 1, 8)), _all(queries), _all(Tiles(32, 128, 1, 8)))
