"""What a rank holds of a model, in terms that do not depend on the layout: the seam between parameters and
checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exlm_dist.checkpoint.pieces import Slice, part_shape

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ShardedParameter:
    """A parameter of this rank.

    `name`: canonical, the same in every layout (that of `build_model(...).named_parameters()`). `shape`: of the full
    parameter, neither sliced nor padded. `slice`: the part this rank holds; None: all of it. `saved`: False where a
    rank with another place in the pipeline or among the tensor-parallel ranks saves the very same part (a tied copy,
    a parameter that tensor-parallel ranks hold in common); it is loaded all the same. Data-parallel replicas share the
    saving among themselves and are all True.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    slice: Slice | None = None
    saved: bool = True

    @property
    def numel(self) -> int:
        """Numbers in the full parameter."""
        return math.prod(self.shape)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of the part this rank holds, without padding."""
        return part_shape(self.shape, self.slice)


def set_sharding(parameter: nn.Parameter, shape: tuple[int, ...], part: Slice | None, *, saved: bool) -> None:
    """Note on a `parameter` how it lies in the full one of `shape`, for `sharded_parameters`."""
    parameter.extent = (tuple(shape), part, saved)


def sharded_parameters(model: nn.Module) -> list[ShardedParameter]:
    """What this rank holds of `model`, in the order of its parameters: all of each where nothing else is noted."""
    whole = ((name, parameter, (tuple(parameter.shape), None, True)) for name, parameter in model.named_parameters())
    return [
        ShardedParameter(name, parameter, *getattr(parameter, "extent", extent)) for name, parameter, extent in whole
    ]
