"""Dropout whose mask is a pure function of a key, so that recomputed activations and resumed runs see the same one."""

from __future__ import annotations

from torch import Tensor

from exlm_dist.kernels import elementwise
from exlm_dist.utils.seeding import seed_from


def site_seed(dropout_seed: int, layer: int, site: str) -> int:
    """Key of one place where dropout acts in one micro-batch."""
    return seed_from("dropout", dropout_seed, layer, site)


def dropout(x: Tensor, probability: float, seed: int, *, backend: str = "auto") -> Tensor:
    """`x` with each element zeroed with `probability` and the others scaled up; the identity at probability 0."""
    return elementwise.dropout_add(x, None, dropout=probability, seed=seed, backend=backend)


def dropout_add(x: Tensor, residual: Tensor, probability: float, seed: int, *, backend: str = "auto") -> Tensor:
    """`residual + dropout(x)` in one pass over the memory."""
    return elementwise.dropout_add(x, residual, dropout=probability, seed=seed, backend=backend)
