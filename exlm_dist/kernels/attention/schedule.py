"""Tile sizes of the attention kernels: a fixed table, chosen by head width, type and GPU; nothing is timed at run time.

A form covers the sequences whose length is in (lower, upper]. Which form computes a sequence depends on nothing but its own
length (and the table), so a sequence's values do not change with its batch-mates.
"""

from __future__ import annotations

from dataclasses import dataclass

UNLIMITED = 2**31 - 1


@dataclass(frozen=True)
class Tiles:
    """Tile of one kernel: `queries` x `keys`; `resident` query tiles are held by a program; warps, pipeline stages, cap on registers."""

    queries: int
    keys: int
    resident: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True)
class Form:
    """How sequences with lower < tokens <= upper are computed: `backward` in one kernel, else `queries` and `keys`."""

    lower: int
    upper: int
    forward: Tiles
    queries: Tiles
    keys: Tiles


def forms(width: int, itemsize: int, max_tokens: int, dropout: bool, capability: tuple[int, int]) -> list[Form]:
    """The forms that a batch with sequences of at most `max_tokens` tokens needs, shortest first."""
    if itemsize == 4:
        found = _exact(width)
    elif width > 64:
        found = _wide(capability)
    else:
        found = _narrow(dropout, capability)
    return [form for form in found if form.lower < max(max_tokens, 1)]


def _exact(width: int) -> list[Form]:
    """fp32 without tensor cores: for checks, not for speed."""
    tiles = Tiles(16, 16, 1, 4 if width <= 64 else 8, 1)
    return [Form(0, UNLIMITED, tiles, tiles, tiles)]


def _narrow(dropout: bool, capability: tuple[int, int]) -> list[Form]:
    """Half precision, heads of at most 64: measured on an H100 (benchmarks/results)."""
    square = Tiles(64, 64, 1, 4, 1)
    if capability < (9, 0):
        return [Form(0, UNLIMITED, square, Tiles(64, 32, 1, 4, 1), Tiles(32, 64, 1, 4, 1))]
    three = Tiles(64, 64, 3, 4, 1)
    return [
        Form(0, 128, Tiles(64, 64, 2, 4, 1), square, square),
        Form(128, 192, three, square, square),
        Form(192, UNLIMITED, three, square if dropout else Tiles(128, 64, 1, 4, 1), square),
    ]


def _wide(capability: tuple[int, int]) -> list[Form]:
    """Half precision, heads of 96 and 128: chosen so that nothing spills, not measured."""
    if capability < (9, 0):
        return [Form(0, UNLIMITED, Tiles(64, 32, 1, 8, 1), Tiles(64, 32, 1, 8, 1), Tiles(32, 64, 1, 8, 1))]
    return [Form(0, UNLIMITED, Tiles(128, 64, 1, 8, 1), Tiles(64, 64, 1, 8, 1), Tiles(32, 128, 1, 8, 1))]
