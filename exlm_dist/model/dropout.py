"""Dropout whose mask is a pure function of a key, so that recomputed activations and resumed runs see the same one."""

from __future__ import annotations

from torch import Tensor

from exlm_dist.kernels import elementwise

#: Where dropout acts in a block; the embedding is the site before all blocks.
_SITES = ("weights", "attention", "ffn")
EMBEDDING_SITE = 0


def block_site(layer: int, name: str) -> int:
    """Number of a place where dropout acts: `weights` (of the attention), `attention` or `ffn` (outputs) of a block."""
    return 1 + layer * len(_SITES) + _SITES.index(name)


def dropout(
    x: Tensor, probability: float, seed: int | Tensor, site: int, first_row: int = 0, *, backend: str = "auto"
) -> Tensor:
    """`x` with each element zeroed with `probability` and the others scaled up; the identity at probability 0.

    `x` may be rows `first_row`.. of a larger tensor, whose mask it then sees.
    """
    key = {"dropout": probability, "seed": seed, "site": site, "first_row": first_row}
    return elementwise.dropout_add(x, None, **key, backend=backend)


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
    key = {"dropout": probability, "seed": seed, "site": site, "first_row": first_row}
    return elementwise.dropout_add(x, residual, **key, backend=backend)
