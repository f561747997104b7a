"""Part of a vocabulary that one rank holds: tensor parallelism needs no second version of the operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Rows first_token..first_token+len(weight)-1 of the vocabulary, and how the ranks put their parts together.

    log_sum: [S] fp32 of each rank -> log of the sum of their exponentials over the ranks (two fp32 per row at most: a
    maximum and a sum); total: sum of a tensor over the ranks. Both may overwrite their argument, and are not asked to
    be differentiable: the gradients of weight and bias are complete on each rank, that of the states is this rank's
    share and must be summed by the caller (as the backward pass of a column-parallel layer does).
    """

    first_token: int
    log_sum: Callable[[Tensor], Tensor]
    total: Callable[[Tensor], Tensor]
