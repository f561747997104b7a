"""What a rank holds of a model, in terms that do not depend on the layout: the seam between parameters and
checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Slice:
    """Rows (`dim` 0), columns (1), ... `start` to `stop` of a full tensor: what a tensor-parallel rank holds of it.

    A local tensor longer than `stop - start` along `dim` ends in padding (a vocabulary filled up to the degree).
    """

    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class Held:
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


def part_shape(shape: tuple[int, ...], cut: Slice | None) -> tuple[int, ...]:
    """Shape of a slice of a tensor of `shape`."""
    return shape if cut is None else (*shape[: cut.dim], cut.stop - cut.start, *shape[cut.dim + 1 :])


def set_extent(parameter: nn.Parameter, shape: tuple[int, ...], part: Slice | None, *, saved: bool) -> None:
    """Note on a `parameter` how it lies in the full one of `shape`, for `held_by`."""
    parameter.extent = (tuple(shape), part, saved)


def held_by(model: nn.Module) -> list[Held]:
    """What this rank holds of `model`, in the order of its parameters: all of each where nothing else is noted."""
    whole = ((name, parameter, (tuple(parameter.shape), None, True)) for name, parameter in model.named_parameters())
    return [Held(name, parameter, *getattr(parameter, "extent", extent)) for name, parameter, extent in whole]
