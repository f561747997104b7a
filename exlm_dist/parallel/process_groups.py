"""The process groups of a layout, as one rank sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from exlm_dist.parallel.layout import Axis, Layout


@dataclass(frozen=True)
class ParallelGroup:
    """A process group as this rank sees it: its rank in the group, the number of ranks, and torch's handle."""

    rank: int
    size: int
    group: Any

    @property
    def is_first(self) -> bool:
        """Whether this is the first of its ranks."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this is the last of its ranks."""
        return self.rank == self.size - 1


@dataclass(frozen=True)
class Grid:
    """Where this rank is in its layout. `model`: the ranks of one replica, tensor x pipeline."""

    layout: Layout
    tensor: ParallelGroup
    pipeline: ParallelGroup
    data: ParallelGroup
    model: ParallelGroup

    @staticmethod
    def make(layout: Layout, rank: int) -> Grid:
        """Make the process groups. A collective: every rank makes every group, in the same order.

        Their timeout is that which `parallel.process.start` has given to `dist.new_group`.
        """
        groups = {axis: _make_group(layout, rank, axis) for axis in ("tensor", "pipeline", "data")}
        return Grid(layout, **groups, model=_make_group(layout, rank, "pipeline", "tensor"))

    @property
    def reports_metrics(self) -> bool:
        """Whether sums over all ranks count this one: the last stage has the results, on all its tensor ranks alike."""
        return self.pipeline.is_last and self.tensor.is_first


def _make_group(layout: Layout, rank: int, *along: Axis) -> ParallelGroup:
    groups = layout.groups(*along)
    mine = next(members for members in groups if rank in members)
    index, size = mine.index(rank), len(mine)
    if size == layout.world:
        return ParallelGroup(index, size, dist.group.WORLD)
    if size == 1:
        return ParallelGroup(index, size, dist.new_group(mine, use_local_synchronization=True))
    made = [dist.new_group(members) for members in groups]
    return ParallelGroup(index, size, made[groups.index(mine)])


class Mpu:
    """A grid under the names by which DeepSpeed asks for it (its own pipeline engine brings its own)."""

    def __init__(self, grid: Grid, ranks: list[int]) -> None:
        self._grid, self._data_ranks = grid, ranks

    def get_data_parallel_rank(self) -> int:
        """Index of this replica."""
        return self._grid.data.rank

    def get_data_parallel_world_size(self) -> int:
        """Number of replicas."""
        return self._grid.data.size

    def get_data_parallel_group(self) -> Any:
        """The ranks with the same weights."""
        return self._grid.data.group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their global ranks."""
        return self._data_ranks

    def get_model_parallel_rank(self) -> int:
        """Index among the ranks of one replica; DeepSpeed takes norms of replicated parameters from the first."""
        return self._grid.model.rank

    def get_model_parallel_world_size(self) -> int:
        """Number of ranks of one replica."""
        return self._grid.model.size

    def get_model_parallel_group(self) -> Any:
        """The ranks of one replica."""
        return self._grid.model.group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
