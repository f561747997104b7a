"""Which part of a model a rank holds, as its layers see it: they know no rank and ask this for what they exchange.

A layer names in `cuts` how its matrices may be divided among the ranks of a tensor-parallel group:

- `column`: the outputs of a linear layer (rows of its weight), whose input all ranks have;
- `row`: the inputs of a linear layer (columns of its weight); outputs are summed over the ranks, the bias is not cut;
- `heads`: the outputs, where the layer itself sees to the exchange;
- `embedding`, `vocabulary`: the words (rows) of a table, a bias over the words;
- `rows`: nothing of the parameter; but it acts on the rows (tokens) that the rank holds between the matrices, so
  that under sequence parallelism its gradient is a sum over the ranks.

What is not named is held by every rank, which computes the same with it.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Cut = Literal["column", "row", "heads", "embedding", "vocabulary", "rows"]


class Part:
    """All of a model: nothing is exchanged. `parallel.tensor.TensorPart` is the part of one rank among several.

    Letters: R rows (tokens or states) of a packed micro-batch, D width.
    """

    #: Whether this is all of the model.
    whole = True
    #: Packed tensors have a multiple of so many rows.
    row_multiple = 1

    def first(self, held: int) -> int:
        """Number of the first of `held` heads or words, of which each rank holds equally many."""
        return 0

    def first_row(self, held: int) -> int:
        """Number of the first of `held` rows between the matrices."""
        return 0

    def all_rows(self, hidden: Tensor) -> Tensor:
        """All rows [R, D] from those held here; what follows is the same on every rank."""
        return hidden

    def take_rows(self, hidden: Tensor, index: Tensor) -> Tensor:
        """Rows `index` of all rows, as far as they are to be held here."""
        return F.embedding(index, hidden)

    def entering(self, x: Tensor) -> Tensor:
        """`x`, which all ranks have, where each goes on with its own heads or words: gradients are summed there."""
        return x

    def embed(self, ids: Tensor, weight: Tensor) -> Tensor:
        """Rows `ids` [R] of a table of which `weight` is held here, [R, D], as far as they are to be held here."""
        return F.embedding(ids, weight)

    def total(self, x: Tensor) -> Tensor:
        """Sum of `x` over the ranks; may overwrite it and has no gradient."""
        return x

    def log_sum(self, x: Tensor) -> Tensor:
        """Logarithm of the sum of exp(x) over the ranks, with its gradient."""
        return x

    def best(self, values: Tensor, ids: Tensor) -> Tensor:
        """Of `ids`, elementwise, the one with the largest of `values` over the ranks."""
        return ids


#: All of a model.
WHOLE = Part()
