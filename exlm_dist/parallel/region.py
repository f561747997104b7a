"""The tensor-parallel region that a layer is in, as the layer sees it: it knows no rank and asks this for what it
exchanges.

A layer names in `tensor_sharding` how its parameters may be sharded over the ranks of a tensor-parallel group:

- `column`: the outputs of a linear layer (rows of its weight), whose input all ranks have;
- `row`: the inputs of a linear layer (columns of its weight); outputs are reduced over the ranks, the bias is
  replicated;
- `head`: the outputs, where the layer itself sees to the exchange;
- `embedding`, `vocab`: the rows of the token matrix, the biases over the vocabulary;
- `token`: replicated; but it acts on the tokens that each rank has between the linear layers, so that under sequence
  parallelism its gradient is a sum over the ranks.

What is not named is replicated: every rank computes the same with it.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Sharding = Literal["column", "row", "head", "embedding", "vocab", "token"]


class TensorRegion:
    """A region of one rank: nothing is exchanged. `parallel.tensor.ShardedRegion` is that of one rank among several.

    Letters: R rows (tokens or states) of a packed micro-batch, D width.
    """

    #: Whether the layers here have but a part of their sharded parameters.
    is_sharded = False
    #: Packed tensors have a multiple of so many rows.
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


#: The region of layers that no other rank has a part of.
UNSHARDED = TensorRegion()
