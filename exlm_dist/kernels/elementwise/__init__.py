"""Between the matrix products: dropout, residual sums, LayerNorm, gelu (maths: README.md beside this file)."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor, float64

from exlm_dist.kernels.backend import implementation
from exlm_dist.kernels.checks import check_shape

__all__ = ["add_norm", "dropout_add", "gelu_gradient_"]


def dropout_add(
    branch: Tensor,
    residual: Tensor | None,
    *,
    dropout: float,
    seed: int | Tensor,
    site: int = 0,
    first_row: int = 0,
    backend: str = "auto",
) -> Tensor:
    """residual + dropout(branch), both [R, W]; without a residual dropout(branch).

    `dropout` is the probability that an element is zeroed; the others are scaled up. The mask depends on `seed` and
    `site` (`kernels.randomness`), W and the implementation, row by row: where the tensors are rows `first_row`.. of
    larger ones, their mask is that part of the larger ones' mask. ValueError on shapes that do not fit.
    """
    if residual is not None:
        check_shape("residual", residual, tuple(branch.shape))
    if dropout == 0.0 and residual is None:
        return branch
    return _implementation(branch, backend).dropout_add(
        branch, residual, dropout=dropout, seed=seed, site=site, first_row=first_row
    )


def add_norm(
    branch: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    site: int = 0,
    first_row: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(hidden, normed), both [R, W]: hidden = residual + dropout(branch), and its LayerNorm with weight and bias [W].

    Without a branch hidden is the residual. Take hidden, not the residual, for what follows: its gradient and that of
    the norm are then summed in one pass. The norm is computed in fp32 from hidden as it is stored. `dropout`, `seed`,
    `site` and `first_row` as in `dropout_add`. ValueError on shapes that do not fit.
    """
    check_shape("residual", residual, (None, None))
    if branch is not None:
        check_shape("branch", branch, tuple(residual.shape))
    check_shape("weight", weight, (residual.shape[1],))
    check_shape("bias", bias, (residual.shape[1],))
    chosen = _implementation(residual, backend)
    key = {"dropout": dropout, "seed": seed, "site": site, "first_row": first_row}
    return chosen.add_norm(branch, residual, weight, bias, eps=eps, **key)


def gelu_gradient_(grad: Tensor, x: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Multiply `grad` [R, W] in place by the derivative of the exact (erf) gelu at x [R, W]; both contiguous.

    Returns gelu(x) [R, W], and the sum over the rows of the new grad [W]: the gradient of a bias that is part of x.
    ValueError on shapes that do not fit.
    """
    check_shape("x", x, (None, None))
    check_shape("grad", grad, tuple(x.shape))
    return _implementation(x, backend).gelu_gradient_(grad, x)


def _implementation(tensor: Tensor, backend: str) -> ModuleType:
    """The Triton form has no fp64."""
    return implementation("elementwise", "torch" if tensor.dtype == float64 else backend, tensor.device)
