"""Dropout whose mask is a pure function of a key: recomputed activations and resumed runs see the same one."""

from __future__ import annotations

from torch import Tensor

from exlm_dist.kernels import elementwise

#: Sites of dropout in a block; that of the embedding comes before those of all blocks.
_SITES = ("weights", "attention", "ffn")
EMBEDDING_SITE = 0


def block_site(layer: int, name: str) -> int:
    """Site number of the dropout on the attention `weights`, or on the output of `attention` or `ffn`, of a block."""
    return 1 + layer * len(_SITES) + _SITES.index(name)


def dropout(
    x: Tensor, probability: float, seed: int | Tensor, site: int, first_row: int = 0, *, backend: str = "auto"
) -> Tensor:
    """`x` with each element zeroed with `probability` and the others scaled up; the identity at probability 0.

    `x` may be rows `first_row`.. of a larger tensor, and then gets its part of that tensor's mask.
    """
    return elementwise.dropout_add(
        x, None, dropout=probability, seed=seed, site=site, first_row=first_row, backend=backend
    )


def dropout_add(
    x: Tensor,
    residual: Tensor,
    probability: float,
    seed: int | Tensor,
    site: int,
    first_row: int = 0,
    *,
    backend: str = "auto",
) -> Tensor:
    """`residual + dropout(x)` in one pass over the memory."""
    return elementwise.dropout_add(
        x, residual, dropout=probability, seed=seed, site=site, first_row=first_row, backend=backend
    )
