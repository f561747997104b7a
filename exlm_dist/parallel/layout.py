"""The coordinates of each rank: pure arithmetic, without torch.

Ranks are numbered in the order (pipeline, data, tensor), the tensor rank varying fastest: a tensor group is a run of
neighbours (one machine), and the stages of a pipeline are farthest apart. That is the order of DeepSpeed's
`PipeModelDataParallelTopology` and of megatron-core's default.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

from exlm_dist.config.layouts import data_degree
from exlm_dist.config.schema import ParallelConfig

Axis = Literal["pipeline", "data", "tensor"]
AXES: tuple[Axis, ...] = ("pipeline", "data", "tensor")


@dataclass(frozen=True)
class Coordinates:
    """Pipeline stage, replica and tensor rank of a rank."""

    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """Degrees of tensor, pipeline and data parallelism."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @staticmethod
    def of(parallel: ParallelConfig, world: int) -> Layout:
        """The layout of a configuration on `world` ranks; ConfigError where it does not fit them."""
        return Layout(parallel.tensor, parallel.pipeline, data_degree(parallel, world))

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.tensor * self.pipeline * self.data

    def coordinates(self, rank: int) -> Coordinates:
        """Coordinates of `rank`."""
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is not below the {self.world} ranks of {self}")
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(pipeline, data, tensor)

    def rank(self, at: Coordinates) -> int:
        """The rank whose coordinates are `at`."""
        return (at.pipeline * self.data + at.data) * self.tensor + at.tensor

    def groups(self, *along: Axis) -> list[list[int]]:
        """The ranks that differ only in the axes `along`, group by group; each group ascends."""
        fixed = [axis for axis in AXES if axis not in along]
        varying = [axis for axis in AXES if axis in along]
        found = []
        for values in product(*(range(getattr(self, axis)) for axis in fixed)):
            others = dict(zip(fixed, values))
            members = product(*(range(getattr(self, axis)) for axis in varying))
            found.append([self.rank(Coordinates(**others, **dict(zip(varying, member)))) for member in members])
        return found

    def group_of(self, rank: int, *along: Axis) -> list[int]:
        """The ranks that differ from `rank` only in the axes `along`."""
        return next(group for group in self.groups(*along) if rank in group)
