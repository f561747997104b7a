"""The definition of the elementwise operations: their equations, gradients by autograd.

A mask [R, W] is what dropout multiplies its argument by: 0, or 1 / (1 - p) for the elements that are kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dropout_add(branch: Tensor, residual: Tensor | None, mask: Tensor) -> Tensor:
    """residual + mask * branch, [R, W] each; without a residual mask * branch.

    Source: Srivastava et al. 2014 (dropout, in its inverted form).
    """
    dropped = mask * branch
    return dropped if residual is None else residual + dropped


def add_norm(
    branch: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(hidden, normed): hidden = residual + mask * branch (None: without), and its LayerNorm over the last dimension.

    branch, residual [R, W]; weight, bias [W]. Source: Ba et al. 2016 (LayerNorm).
    """
    hidden = residual
    if branch is not None:
        hidden = residual + branch if mask is None else dropout_add(branch, residual, mask)
    mean = hidden.mean(-1, keepdim=True)
    variance = (hidden - mean).square().mean(-1, keepdim=True)
    return hidden, weight * (hidden - mean) / (variance + eps).sqrt() + bias


def gelu_gradient(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(gelu(x), sum over the rows of the gradient of x, gradient of x) where gelu(x) has the gradient grad [R, W].

    gelu(x) = x Phi(x), Phi the normal distribution function. Source: Hendrycks and Gimpel 2016.
    """
    x = x.detach().requires_grad_()
    gelu = x * (1 + torch.erf(x / math.sqrt(2))) / 2
    (grad_x,) = torch.autograd.grad(gelu, x, grad)
    return gelu.detach(), grad_x.sum(0), grad_x
