"""The local part of a model in terms that do not depend on the layout: the seam between parameters and checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exlm_dist.checkpoint.pieces import Slice, part_shape

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ShardedParameter:
    """A parameter of this rank.

    `name`: canonical, the same in every layout (that of `build_model(...).named_parameters()`). `shape`: of the full
    parameter, neither sliced nor padded. `slice`: the part on this rank; None: all of it. `saved`: False where another
    pipeline stage or tensor-parallel rank saves the very same part (a tied copy, a parameter that is replicated over
    the tensor-parallel ranks); it is loaded all the same. Data-parallel replicas divide the saving among themselves
    and are all True.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    slice: Slice | None = None
    saved: bool = True

    @property
    def numel(self) -> int:
        """Elements of the full parameter."""
        return math.prod(self.shape)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of the part on this rank, without padding."""
        return part_shape(self.shape, self.slice)


def set_sharding(parameter: nn.Parameter, shape: tuple[int, ...], part: Slice | None, *, saved: bool) -> None:
    """Note on a `parameter` which part it is of the full one of `shape`, for `sharded_parameters`."""
    annotated: Any = parameter
    annotated.sharding = (tuple(shape), part, saved)


def has_sharding(parameter: nn.Parameter) -> bool:
    """Whether `set_sharding` has been called for it."""
    return hasattr(parameter, "sharding")


def sharded_parameters(model: nn.Module) -> list[ShardedParameter]:
    """The parameters of `model` on this rank, in its order: the full ones where nothing else is noted."""
    return [
        ShardedParameter(name, parameter, *getattr(parameter, "sharding", (tuple(parameter.shape), None, True)))
        for name, parameter in model.named_parameters()
    ]
