"""The position-wise feed-forward network."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from exlm_dist.kernels.elementwise import gelu_gradient_
from exlm_dist.kernels.linear import BiasPassingLinear, add_product, linear, linear_gelu, product
from exlm_dist.parallel.region import Sharding

#: Inner activations [rows, F] worked on at a time on a CPU, in elements: few enough to stay in its cache.
_BLOCK_ELEMENTS = 1 << 19


class FeedForward(nn.Module):
    """down(gelu(up(x))) with the exact (erf) gelu."""

    tensor_sharding: ClassVar[dict[str, Sharding]] = {"up": "column", "down": "row"}

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = UpLinear(width, inner)
        self.down = GeluLinear(inner, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [T, D] -> [T, D]."""
        return self.down(*self.up(hidden))


class UpLinear(BiasPassingLinear):
    """`BiasPassingLinear` that applies the gelu too where nothing is kept for a backward pass."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [T, D] -> what comes before the gelu [T, F] and the bias in it; without gradients (gelu of it, None)."""
        return super().forward(x) if torch.is_grad_enabled() else (linear_gelu(x, self.weight, self.bias), None)


class GeluLinear(nn.Linear):
    """Linear map of gelu(x) that keeps x alone for the backward pass and makes gelu(x) again there."""

    def forward(self, x: Tensor, inner_bias: Tensor | None) -> Tensor:
        """x [T, F], before the gelu, in which inner_bias [F] has been added -> [T, D]. None: x is after the gelu."""
        if inner_bias is None:
            return linear(x, self.weight, self.bias)
        return self.product(x, self.weight, self.bias, inner_bias)

    @staticmethod
    def product(x: Tensor, weight: Tensor, bias: Tensor | None, inner_bias: Tensor) -> Tensor:
        """gelu(x) weight^T + bias; the gradient of inner_bias comes out of the pass that makes x's."""
        return _GeluLinear.apply(x, weight, bias, inner_bias)


class _GeluLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, inner_bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if x.device.type != "cpu":
            return F.linear(F.gelu(x), weight, bias)
        out = x.new_empty(len(x), len(weight))
        for rows in _blocks(x):
            out[rows] = product(F.gelu(x[rows]), weight.t(), bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        if x.device.type != "cpu":
            grad_x = grad @ weight
            activated, grad_inner = gelu_gradient_(grad_x, x)
            return grad_x, grad.t() @ activated, grad_bias, grad_inner
        grad_x, grad_weight, blocks = torch.empty_like(x), torch.zeros_like(weight), _blocks(x)
        sums = x.new_empty(len(blocks), x.shape[1])
        for rows, block_sum in zip(blocks, sums):
            grad_weight = add_product(grad_weight, grad[rows].t(), F.gelu(x[rows]))
            torch.ops.aten.gelu_backward.grad_input(product(grad[rows], weight), x[rows], grad_input=grad_x[rows])
            torch.sum(grad_x[rows], 0, out=block_sum)
        return grad_x, grad_weight, grad_bias, sums.sum(0)


def _blocks(x: Tensor) -> list[slice]:
    """Runs of rows."""
    step = max(1, _BLOCK_ELEMENTS // x.shape[1])
    return [slice(first, first + step) for first in range(0, len(x), step)]
