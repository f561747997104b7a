"""Parameters in pieces: which numbers of a full tensor a piece holds, whether pieces make up the whole, and how to put
another cut together from them. Arithmetic only: no files and no torch.

A rank holds a `Slice` of a parameter (all of it without tensor parallelism) and owns a range `start:stop` of that
slice, flattened row by row: its ZeRO fragment. So a piece is (slice, start, stop), and needs no other rank to be
written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Slice:
    """Rows (`dim` 0), columns (1), ... `start` to `stop` of a full tensor: what a tensor-parallel rank holds of it.

    A local tensor longer than `stop - start` along `dim` ends in padding (a vocabulary filled up to the degree).
    """

    dim: int
    start: int
    stop: int


def part_shape(shape: tuple[int, ...], cut: Slice | None) -> tuple[int, ...]:
    """Shape of a slice of a tensor of `shape`."""
    return shape if cut is None else (*shape[: cut.dim], cut.stop - cut.start, *shape[cut.dim + 1 :])


@dataclass(frozen=True)
class Piece:
    """Numbers `start` to `stop` of the flattened `slice` (None: all) of a parameter, in the files of `rank`."""

    slice: Slice | None
    start: int
    stop: int
    rank: int

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return self.stop - self.start

    def as_json(self) -> dict[str, Any]:
        """As it stands in the index: `{"rank": 3, "range": [0, 4096], "slice": [1, 0, 64]}` or `"slice": null`."""
        cut = None if self.slice is None else [self.slice.dim, self.slice.start, self.slice.stop]
        return {"rank": self.rank, "range": [self.start, self.stop], "slice": cut}

    @staticmethod
    def from_json(entry: dict[str, Any]) -> Piece:
        """The reverse of `as_json`."""
        cut = None if entry["slice"] is None else Slice(*entry["slice"])
        return Piece(cut, *entry["range"], entry["rank"])


def gap(shape: Shape, pieces: Iterable[Piece]) -> str | None:
    """None when the pieces make up a tensor of `shape` exactly; else what is missing, doubled or out of place.

    The slices must share one dimension and follow one another along it; the ranges must do so within each slice.
    """
    if math.prod(shape) == 0:
        return None
    pieces = [piece for piece in pieces if piece.numel]
    dims = {None if piece.slice is None else piece.slice.dim for piece in pieces}
    if not dims:
        return "it has no pieces"
    if len(dims) > 1:
        return f"its pieces are cut along different dimensions {sorted(map(str, dims))}"
    dim = dims.pop()
    if dim is None:
        return _break([(piece.start, piece.stop) for piece in pieces], math.prod(shape), "numbers")
    if dim >= len(shape):
        return f"its pieces are cut along dimension {dim}, but it has {len(shape)}"
    ordered = sorted(pieces, key=lambda piece: (piece.slice.start, piece.slice.stop))
    groups = [(cut, list(group)) for cut, group in groupby(ordered, key=lambda piece: piece.slice)]
    fault = _break([(cut.start, cut.stop) for cut, _ in groups], shape[dim], f"places of dimension {dim}")
    for cut, group in groups:
        size = math.prod(part_shape(shape, cut))
        fault = fault or _break([(piece.start, piece.stop) for piece in group], size, f"numbers of slice {cut}")
    return fault


def _break(ranges: list[tuple[int, int]], end: int, what: str) -> str | None:
    at = 0
    for start, stop in [*sorted(ranges), (end, end)]:
        if start != at or stop < start:
            return f"{what} {min(at, start)} to {max(at, start)} are {'missing' if start > at else 'there twice'}"
        at = stop
    return None


def overlaps(shape: Shape, target: Piece, source: Piece) -> Iterator[tuple[int, int, int]]:
    """(place in target, place in source, count) of every run of numbers that both pieces hold of one parameter."""
    if target.slice == source.slice:
        start, stop = max(target.start, source.start), min(target.stop, source.stop)
        if start < stop:
            yield start - target.start, start - source.start, stop - start
        return
    to, to_length = _runs(shape, target)
    of, of_length = _runs(shape, source)
    first = np.searchsorted(of + of_length, to, side="right")
    last = np.searchsorted(of, to + to_length, side="left")
    count = np.maximum(last - first, 0)
    i = np.repeat(np.arange(len(to)), count)
    j = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    low = np.maximum(to[i], of[j])
    high = np.minimum(to[i] + to_length[i], of[j] + of_length[j])
    into = (np.cumsum(to_length) - to_length)[i] + low - to[i]
    out_of = (np.cumsum(of_length) - of_length)[j] + low - of[j]
    yield from zip(into.tolist(), out_of.tolist(), (high - low).tolist())


def _runs(shape: Shape, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
    """Starts in the flattened full tensor, and lengths, of the runs that a piece is made of; both int64, ascending."""
    cut = piece.slice or Slice(0, 0, shape[0] if shape else 1)
    inner = math.prod(shape[cut.dim + 1 :])
    length, full = (cut.stop - cut.start) * inner, math.prod(shape[cut.dim :])
    if piece.stop <= piece.start or length == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    rows = np.arange(piece.start // length, -(-piece.stop // length), dtype=np.int64)
    low = np.maximum(rows * length, piece.start)
    high = np.minimum((rows + 1) * length, piece.stop)
    return rows * full + cut.start * inner + low - rows * length, high - low
