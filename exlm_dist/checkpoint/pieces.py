"""Parameters in pieces: which elements of a full tensor a piece covers, whether pieces make up the whole, and how other
pieces are assembled from them. Arithmetic only: no files and no torch.

A rank has a `Slice` of a parameter (all of it without tensor parallelism) and owns a range `start:stop` of that slice,
flattened row by row: its ZeRO fragment. So a piece is (slice, start, stop), and needs no other rank to be written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Slice:
    """Rows (`dim` 0), columns (1), ... `start` to `stop` of a full tensor: what a tensor-parallel rank has of it.

    A local tensor longer than `stop - start` along `dim` ends in padding (a vocabulary filled up to the degree).
    """

    dim: int
    start: int
    stop: int


def part_shape(shape: Shape, part: Slice | None) -> Shape:
    """Shape of a slice (None: all) of a tensor of `shape`."""
    return shape if part is None else (*shape[: part.dim], part.stop - part.start, *shape[part.dim + 1 :])


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` of the flattened `slice` (None: all) of a parameter, in the files of `rank`."""

    slice: Slice | None
    start: int
    stop: int
    rank: int

    @property
    def numel(self) -> int:
        """Elements in it."""
        return self.stop - self.start

    def as_json(self) -> dict[str, Any]:
        """Its entry in the index: `{"rank": 3, "range": [0, 4096], "slice": [1, 0, 64]}` or `"slice": null`."""
        part = None if self.slice is None else [self.slice.dim, self.slice.start, self.slice.stop]
        return {"rank": self.rank, "range": [self.start, self.stop], "slice": part}

    @staticmethod
    def from_json(entry: dict[str, Any]) -> Piece:
        """The reverse of `as_json`."""
        part = None if entry["slice"] is None else Slice(*entry["slice"])
        start, stop = entry["range"]
        return Piece(part, start, stop, entry["rank"])


def gap(shape: Shape, pieces: Iterable[Piece]) -> str | None:
    """None when the pieces make up a tensor of `shape` exactly; else what is missing, doubled or out of place.

    All slices must be along one dimension and adjacent there; so must the ranges within each slice.
    """
    if math.prod(shape) == 0:
        return None
    ranges: dict[Slice | None, list[tuple[int, int]]] = {}
    for piece in pieces:
        if piece.numel:
            ranges.setdefault(piece.slice, []).append((piece.start, piece.stop))
    if not ranges:
        return "it has no pieces"
    if None in ranges and len(ranges) == 1:
        return _break(ranges[None], math.prod(shape), "elements")
    dims = {None if part is None else part.dim for part in ranges}
    if len(dims) > 1:
        return f"its pieces are cut along different dimensions {sorted(map(str, dims))}"
    slices = sorted((part for part in ranges if part is not None), key=lambda part: (part.start, part.stop))
    dim = slices[0].dim
    if dim >= len(shape):
        return f"its pieces are cut along dimension {dim}, but it has {len(shape)}"
    fault = _break([(part.start, part.stop) for part in slices], shape[dim], f"indices of dimension {dim}")
    for part in slices:
        size = math.prod(part_shape(shape, part))
        fault = fault or _break(ranges[part], size, f"elements of slice {part}")
    return fault


def _break(ranges: list[tuple[int, int]], end: int, what: str) -> str | None:
    """What keeps the ranges from covering 0 to `end` once."""
    at = 0
    for start, stop in [*sorted(ranges), (end, end)]:
        if start != at or stop < start:
            return f"{what} {min(at, start)} to {max(at, start)} are {'missing' if start > at else 'there twice'}"
        at = stop
    return None


def overlaps(shape: Shape, target: Piece, source: Piece) -> Iterator[tuple[int, int, int]]:
    """(offset in target, offset in source, count) of every run of elements that two pieces of one parameter have in
    common."""
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
    """Starts in the flattened full tensor, and lengths, of the contiguous runs of a piece; both int64, ascending."""
    part = piece.slice or Slice(0, 0, shape[0] if shape else 1)
    inner = math.prod(shape[part.dim + 1 :])
    length, full = (part.stop - part.start) * inner, math.prod(shape[part.dim :])
    if piece.stop <= piece.start or length == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    rows = np.arange(piece.start // length, -(-piece.stop // length), dtype=np.int64)
    low = np.maximum(rows * length, piece.start)
    high = np.minimum((rows + 1) * length, piece.stop)
    return rows * full + part.start * inner + low - rows * length, high - low
