"""Which attention weights are dropped, in terms that do not depend on which heads are local to which rank."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DropoutMask:
    """The mask of heads `first_head`.. of a layer with `all_heads` heads: the `probability` of a drop, and its key.

    `seed` and `site` are those of `kernels.randomness`.
    """

    probability: float
    seed: int | Tensor
    site: int
    first_head: int
    all_heads: int
