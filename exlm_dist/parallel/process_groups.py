"""The process groups of a layout, as one rank sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from exlm_dist.parallel.layout import Axis, Layout


@dataclass(frozen=True)
class ParallelGroup:
    """The ranks that differ from this one only along some axes: its place among them, their number and their group."""

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
    tensor: ParallelGroup
    pipeline: ParallelGroup
    data: ParallelGroup
    model: ParallelGroup

    @staticmethod
    def make(layout: Layout, rank: int) -> Grid:
        """Make the groups. A collective: every rank makes every group, in the same order.

        They have the time limit of `dist.new_group` as `parallel.process.start` has set it.
        """
        lines = {axis: _line(layout, rank, axis) for axis in ("tensor", "pipeline", "data")}
        return Grid(layout, **lines, model=_line(layout, rank, "pipeline", "tensor"))

    @property
    def reports_metrics(self) -> bool:
        """Whether sums over all ranks take the results of this one: the last stage has them, all its tensor ranks the
        same."""
        return self.pipeline.is_last and self.tensor.is_first


def _line(layout: Layout, rank: int, *along: Axis) -> ParallelGroup:
    groups = layout.groups(*along)
    mine = next(members for members in groups if rank in members)
    place, size = mine.index(rank), len(mine)
    if size == layout.world:
        return ParallelGroup(place, size, dist.group.WORLD)
    if size == 1:
        return ParallelGroup(place, size, dist.new_group(mine, use_local_synchronization=True))
    made = [dist.new_group(members) for members in groups]
    return ParallelGroup(place, size, made[groups.index(mine)])


class Mpu:
    """A grid under the names by which DeepSpeed asks for it (its own pipeline engine brings its own)."""

    def __init__(self, grid: Grid, ranks: list[int]) -> None:
        self._grid, self._data_ranks = grid, ranks

    def get_data_parallel_rank(self) -> int:
        """Place among the copies of the model."""
        return self._grid.data.rank

    def get_data_parallel_world_size(self) -> int:
        """Copies of the model."""
        return self._grid.data.size

    def get_data_parallel_group(self) -> Any:
        """The ranks that hold the same weights."""
        return self._grid.data.group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their global numbers."""
        return self._data_ranks

    def get_model_parallel_rank(self) -> int:
        """Place among the ranks of one copy; DeepSpeed takes the norms of parameters that are not split from the
        first."""
        return self._grid.model.rank

    def get_model_parallel_world_size(self) -> int:
        """Ranks of one copy."""
        return self._grid.model.size

    def get_model_parallel_group(self) -> Any:
        """The ranks of one copy."""
        return self._grid.model.group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
