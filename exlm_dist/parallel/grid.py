"""The process groups of a layout, as one rank sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from exlm_dist.parallel.layout import Axis, Layout


@dataclass(frozen=True)
class Line:
    """The ranks that differ from this one only along some axes: its place among them, their number and their group.

    `group` is None where this rank is alone, so that nothing is sent.
    """

    rank: int
    size: int
    group: Any

    @property
    def is_first(self) -> bool:
        """Whether this rank comes first among them."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank comes last among them."""
        return self.rank == self.size - 1


@dataclass(frozen=True)
class Grid:
    """Where this rank is in its layout. `model`: the ranks that hold one copy of the model, tensor x pipeline."""

    layout: Layout
    tensor: Line
    pipeline: Line
    data: Line
    model: Line

    @staticmethod
    def make(layout: Layout, rank: int) -> Grid:
        """Make the groups. A collective: every rank makes every group, in the same order.

        They have the time limit of `dist.new_group` as `parallel.process.start` has set it.
        """
        lines = {axis: _line(layout, rank, axis) for axis in ("tensor", "pipeline", "data")}
        return Grid(layout, **lines, model=_line(layout, rank, "pipeline", "tensor"))

    @property
    def speaks(self) -> bool:
        """Whether sums over all ranks take the results of this one: the last stage has them, all its tensor ranks the
        same."""
        return self.pipeline.is_last and self.tensor.is_first


def _line(layout: Layout, rank: int, *along: Axis) -> Line:
    groups = layout.groups(*along)
    mine = next(members for members in groups if rank in members)
    place, size = mine.index(rank), len(mine)
    if size == 1:
        return Line(place, size, None)
    if size == layout.world:
        return Line(place, size, dist.group.WORLD)
    made = [dist.new_group(members) for members in groups]
    return Line(place, size, made[groups.index(mine)])
