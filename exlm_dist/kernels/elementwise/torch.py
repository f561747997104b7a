"""Dropout, residual sum, LayerNorm and gelu tuned in plain torch, what a CPU runs. (The definition is `naive.py`.)"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from exlm_dist.kernels.randomness import site_seed

_LANES = 1 << 16


def keep_mask(
    shape: torch.Size, probability: float, seed: int, device: torch.device, first_row: int = 0
) -> tuple[Tensor, float]:
    """Boolean mask (True: keep) and the factor that makes what is kept unbiased.

    With `first_row` the mask is that of rows first_row.. of a taller tensor: the numbers of the rows before are drawn
    and discarded.

    Each 64-bit random number serves four elements; the probability is thereby rounded to 1/65536, and the factor is the
    inverse of the rounded one, so that the expectation is exact. On a CPU this is about five times faster than drawing
    one Bernoulli variable per element.
    """
    dropped = min(round(probability * _LANES), _LANES - 1)
    generator = torch.Generator(device).manual_seed(seed)
    first = first_row * shape[1:].numel()
    stop = first + shape.numel()
    words = torch.empty((stop + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    # As whole numbers: a comparison to bool takes three times as long.
    keep = words.view(torch.int16)[first:stop].ge_(dropped - _LANES // 2).to(torch.uint8)
    return keep.view(torch.bool).view(shape), _LANES / (_LANES - dropped)


def _factor(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """1 or 0 for True or False; from bool itself the conversion takes three times as long."""
    return keep.view(torch.uint8).to(dtype)


class _DropoutAdd(Function):
    """residual + keep * scale * x, keeping one byte per element for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        ctx.has_residual = residual is not None
        factor = _factor(keep, x.dtype)
        if residual is None:
            return factor.mul_(x).mul_(scale)
        return torch.addcmul(residual, x, factor, value=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (keep,) = ctx.saved_tensors
        grad_x = _factor(keep, grad.dtype).mul_(grad).mul_(ctx.scale)
        return grad_x, grad if ctx.has_residual else None, None, None


def dropout_add(
    branch: Tensor, residual: Tensor | None, *, dropout: float, seed: int | Tensor, site: int, first_row: int
) -> Tensor:
    """See `exlm_dist.kernels.elementwise.dropout_add`."""
    if dropout == 0.0:
        return branch if residual is None else residual + branch
    keep, scale = keep_mask(branch.shape, dropout, site_seed(seed, site), branch.device, first_row)
    return _DropoutAdd.apply(branch, residual, keep, scale)


def add_norm(
    branch: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout: float,
    seed: int | Tensor,
    site: int,
    first_row: int,
) -> tuple[Tensor, Tensor]:
    """See `exlm_dist.kernels.elementwise.add_norm`."""
    hidden = residual
    if branch is not None:
        hidden = dropout_add(branch, residual, dropout=dropout, seed=seed, site=site, first_row=first_row)
    return hidden, F.layer_norm(hidden, (hidden.shape[-1],), weight, bias, eps)


def gelu_gradient_(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """See `exlm_dist.kernels.elementwise.gelu_gradient_`."""
    torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)
    return F.gelu(x), grad.sum(0)
