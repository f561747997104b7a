"""Tile sizes of the attention kernels: a fixed table, chosen by head width, type and GPU; nothing is timed at run time.

A form covers the sequences whose length is in (lower, upper]. Which form computes a sequence depends on nothing but its own
length (and the table), so a sequence's values do not change with its batch-mates.
"""

from __future__ import annotations

from dataclasses import dataclass

UNLIMITED = 2**31 - 1


@dataclass(frozen=True)
class Tiles:
    """Tile of one kernel: `queries` x `keys`; `resident` query tiles are held by a program; warps and pipeline stages."""

    queries: int
    keys: int
    resident: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Form:
    """How sequences with lower < tokens <= upper are computed: `backward` in one kernel, else `queries` and `keys`."""

    lower: int
    upper: int
    forward: Tiles
    backward: Tiles | None
    queries: Tiles | None
    keys: Tiles | None
    owner: Tiles | None = None


def forms(width: int, itemsize: int, max_tokens: int, capability: tuple[int, int]) -> list[Form]:
    """The forms that a batch with sequences of at most `max_tokens` tokens needs, shortest first."""
    found = _table(width, itemsize, capability)
    return [form for form in found if form.lower < max(max_tokens, 1)]


def _table(width: int, itemsize: int, capability: tuple[int, int]) -> list[Form]:
    """All forms, their ranges covering every length from 1."""
    if itemsize == 4:
        return [
            Form(0, 32, Tiles(16, 16, 2, 4, 1), Tiles(16, 16, 2, 4, 1), None, None),
            Form(32, UNLIMITED, Tiles(32, 32, 1, 4, 1), None, Tiles(32, 32, 1, 4, 1), Tiles(32, 32, 1, 4, 1)),
        ]
    small = width <= 64
    long = Form(
        192 if small else 0,
        UNLIMITED,
        Tiles(128, 64, 1, 4 if small else 8, 2),
        None,
        Tiles(128 if small else 64, 64, 1, 4, 2),
        Tiles(64, 64, 1, 4, 2),
    )
    if not small:
        return [long]
    return [Form(0, 192, Tiles(64, 64, 3, 8, 2), Tiles(64, 64, 3, 8, 1), None, None), long]
