"""Matrix products of dense layers: the vendor's own on a GPU, MKL's on an Intel processor, oneDNN's on another x86 one
(why: README.md beside this)."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from exlm_dist.kernels.checks import check_shape

__all__ = [
    "BiasPassingLinear",
    "Linear",
    "add_product",
    "linear",
    "linear_by_column",
    "linear_gelu",
    "product",
]


class Linear(nn.Linear):
    """`torch.nn.Linear` whose products are those of `linear`."""

    passes_bias: ClassVar[bool] = False

    def forward(self, x: Tensor) -> Tensor:
        """x [R, K] -> [R, N]."""
        return self.product(x, self.weight, self.bias)

    @staticmethod
    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x weight^T + bias."""
        return linear(x, weight, bias)


class BiasPassingLinear(Linear):
    """`Linear` that passes its bias on to the next operation, which computes the gradient of this layer's output and
    sums it for the bias in the same pass; through the output itself the bias gets no gradient."""

    passes_bias: ClassVar[bool] = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [R, K] -> (x weight^T + bias [R, N], the bias [N])."""
        # A view keeps its shape where the parameter is emptied behind the layer (ZeRO 3).
        return self.product(x, self.weight, self.bias.detach()), self.bias.view_as(self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [R, K], weight [N, K], bias [N] or None -> x weight^T + bias [R, N], with gradients of all three.

    ValueError on shapes that do not fit.
    """
    check_shape("x", x, (None, weight.shape[1]))
    return _Linear.apply(x, weight, bias) if _by_onednn(x, weight) else F.linear(x, weight, bias)


def linear_by_column(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear`, whose result on a CPU is contiguous by column: neighbouring rows lie side by side. Nothing is copied
    for that, and a gradient that is laid out so is read as it lies."""
    if x.device.type != "cpu":
        return linear(x, weight, bias)
    out = linear(weight, x)
    return (out if bias is None else out.add_(bias[:, None])).t()


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x weight^T + bias) with the exact (erf) gelu, [R, N], without gradients; oneDNN does both in one pass.

    ValueError on shapes that do not fit.
    """
    check_shape("x", x, (None, weight.shape[1]))
    if not _can_onednn(x, weight):
        return F.gelu(F.linear(x, weight, bias))
    return torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), bias, "gelu", [], "none")


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, K] b [K, N] + bias [N], [M, N], without gradients of its own.

    Either operand may be a transposed view: nothing is copied for that. ValueError on shapes that do not fit.
    """
    check_shape("b", b, (a.shape[1], None))
    if bias is not None:
        check_shape("bias", bias, (b.shape[1],))
    if not _by_onednn(a, b):
        return a @ b if bias is None else torch.addmm(bias, a, b)
    return torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b).t(), bias, "none", [], "")


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total [M, N] + a [M, K] b [K, N], without gradients of its own; what is returned takes the place of `total`,
    which may have been overwritten. ValueError on shapes that do not fit.
    """
    check_shape("b", b, (a.shape[1], None))
    check_shape("total", total, (len(a), b.shape[1]))
    if not _by_onednn(a, b):
        return total.addmm_(a, b)
    return torch.ops.mkldnn._linear_pointwise.binary(_dense(a), total.contiguous(), _dense(b).t(), None, "add")


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return (
            input_gradient(grad, weight, x) if needed[0] else None,
            weight_gradient(grad, x) if needed[1] else None,
            grad.sum(0) if needed[2] else None,
        )


def input_gradient(grad: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """grad weight, [R, K], for grad [R, N] and weight [N, K]; by column where x is."""
    if x.is_contiguous() or not x.t().is_contiguous():
        return product(grad, weight)
    return product(weight.t(), grad.t()).t()


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x, [N, K], for grad [R, N] and x [R, K]."""
    # oneDNN repacks its first operand when it is transposed: the smaller one should be it.
    return product(grad.t(), x) if grad.shape[1] <= x.shape[1] else product(x.t(), grad).t()


#: oneDNN and its wrapper in torch keep 1,024 sets of code and scratch space, one per shape of a product. Packed batches
#: hardly repeat their shapes, so that was 1.3 GB after 300 steps; 64 serve every product of a step, in 0.1 GB.
_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}


@functools.cache
def _has_onednn() -> bool:
    for name, capacity in _CACHES.items():  # read by oneDNN at its first product
        os.environ.setdefault(name, capacity)
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return on_x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def _is_intel() -> bool:
    """Whether MKL runs on the processors that it is made for."""
    cpuinfo = Path("/proc/cpuinfo")
    return "GenuineIntel" in (cpuinfo.read_text() if cpuinfo.exists() else platform.processor())


def _can_onednn(a: Tensor, b: Tensor) -> bool:
    on_cpu = a.device.type == b.device.type == "cpu"
    return on_cpu and a.dtype == b.dtype == torch.float32 and a.numel() > 0 and b.numel() > 0 and _has_onednn()


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    return not _is_intel() and _can_onednn(a, b)


def _dense(matrix: Tensor) -> Tensor:
    """The matrix, copied if neither it nor its transpose is contiguous: oneDNN would be hundreds of times slower."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()
