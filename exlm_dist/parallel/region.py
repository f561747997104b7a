"""The tensor-parallel region of a layer: a layer knows no rank and calls its region wherever ranks must communicate.

A layer names in `tensor_sharding` how its parameters may be sharded over the ranks of a tensor-parallel group:

- `column`: the outputs of a linear layer (rows of its weight), whose input all ranks have;
- `row`: the inputs of a linear layer (columns of its weight); outputs are reduced over the ranks, the bias is
  replicated;
- `head`: the outputs, in whole heads; the layer itself communicates;
- `embedding`, `vocab`: the rows of the token matrix, the biases over the vocabulary;
- `token`: replicated, but applied to the local tokens between the linear layers, so that under sequence parallelism
  its gradient must be summed over the ranks.

All other parameters are replicated, and every rank computes the same with them.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Sharding = Literal["column", "row", "head", "embedding", "vocab", "token"]


class TensorRegion:
    """The region of a layer on one rank: nothing is communicated. For several ranks: `parallel.tensor.ShardedRegion`.

    Letters: R rows (tokens or states) of a packed micro-batch, D width.
    """

    #: Whether the layers have only this rank's part of their sharded parameters.
    is_sharded = False
    #: The number of rows of packed tensors is a multiple of this.
    row_multiple = 1

    def first_index(self, local: int) -> int:
        """Index of the first of `local` heads or vocabulary rows, of which each rank has equally many."""
        return 0

    def first_row(self, local: int) -> int:
        """Index of the first of the `local` rows that this rank has between the linear layers."""
        return 0

    def gather_from(self, hidden: Tensor) -> Tensor:
        """All rows [R, D] from the local ones; what follows is the same on every rank."""
        return hidden

    def take_rows(self, hidden: Tensor, index: Tensor) -> Tensor:
        """Rows `index` of all rows; under sequence parallelism this rank's split of them."""
        return F.embedding(index, hidden)

    def copy_to(self, x: Tensor) -> Tensor:
        """`x`, which all ranks have, where each continues with its own heads or vocabulary; backward all-reduces."""
        return x

    def embed(self, ids: Tensor, weight: Tensor) -> Tensor:
        """Rows `ids` [R] of the token matrix, of which `weight` is local, [R, D]; under sequence parallelism this
        rank's split of them."""
        return F.embedding(ids, weight)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of `x` over the ranks; may overwrite it, and has no gradient."""
        return x

    def logsumexp(self, x: Tensor) -> Tensor:
        """Elementwise log of the sum of exp(x) over the ranks, with its gradient."""
        return x

    def argmax(self, values: Tensor, ids: Tensor) -> Tensor:
        """Elementwise, of the `ids` of all ranks the one with the largest of `values`."""
        return ids


#: The region of layers that are not sharded.
UNSHARDED = TensorRegion()
