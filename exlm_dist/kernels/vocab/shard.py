"""One rank's shard of the vocabulary: tensor parallelism needs no second version of the operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Rows first_token..first_token+len(weight)-1 of the vocabulary, and how the ranks combine their results.

    all_reduce_lse: [S] fp32 of each rank -> log of the sum of their exponentials over the ranks (two fp32 per row at
    most: a maximum and a sum); all_reduce_sum: sum of a tensor over the ranks. Both may overwrite their argument and
    need not be differentiable: the gradients of weight and bias are complete on each rank; that of the states is this
    rank's term of a sum that is left to the caller (as in the backward pass of a column-parallel layer).
    """

    first_token: int
    all_reduce_lse: Callable[[Tensor], Tensor]
    all_reduce_sum: Callable[[Tensor], Tensor]
