"""Dropout whose mask is a pure function of a key, so that recomputed activations and resumed runs see the same one."""

from __future__ import annotations

from torch import Tensor

from exlm_dist.kernels import elementwise
from exlm_dist.utils.seeding import seed_from


def site_seed(dropout_seed: int, layer: int, site: str) -> int:
    """Key of one place where dropout acts in one micro-batch."""
    return seed_from("dropout", dropout_seed, layer, site)


def dropout(x: Tensor, probability: float, seed: int, first_row: int = 0, *, backend: str = "auto") -> Tensor:
    """`x` with each element zeroed with `probability` and the others scaled up; the identity at probability 0.

    `x` may be rows `first_row`.. of a larger tensor, whose mask it then sees.
    """
    key = {"dropout": probability, "seed": seed, "first_row": first_row}
    return elementwise.dropout_add(x, None, **key, backend=backend)


def dropout_add(
    x: Tensor, residual: Tensor, probability: float, seed: int, first_row: int = 0, *, backend: str = "auto"
) -> Tensor:
    """`residual + dropout(x)` in one pass over the memory."""
    key = {"dropout": probability, "seed": seed, "first_row": first_row}
    return elementwise.dropout_add(x, residual, **key, backend=backend)
