"""The cases of the elementwise operations that are compiled ahead of time: widths of the model, with and without branch
and dropout, and inner widths of the feed-forward."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from exlm_dist.kernels.elementwise import add_norm, dropout_add, gelu_gradient_


def _run(width: int, dropout: float, dtype: torch.dtype) -> None:
    def rows() -> torch.Tensor:
        return torch.empty(4096, width, dtype=dtype, device="meta", requires_grad=True)

    weight, bias = (torch.empty(width, dtype=dtype, device="meta", requires_grad=True) for _ in range(2))
    key = {"dropout": dropout, "seed": 1 << 40, "backend": "triton"}
    hidden, normed = add_norm(None, rows(), weight, bias, eps=1e-5, backend="triton")
    hidden, normed = add_norm(normed, hidden, weight, bias, eps=1e-5, **key)
    dropout_add(normed, hidden, **key).sum().backward()


def _gelu(width: int, dtype: torch.dtype) -> None:
    grad, x = torch.empty(2, 4096, width, dtype=dtype, device="meta")
    gelu_gradient_(grad, x, backend="triton")


CASES: dict[str, Callable[[], None]] = {
    f"W{width} {str(dtype).removeprefix('torch.')} dropout {dropout}": functools.partial(_run, width, dropout, dtype)
    for width in (256, 1024)
    for dropout in (0.0, 0.1)
    for dtype in (torch.bfloat16, torch.float32)
} | {
    f"F{width} {str(dtype).removeprefix('torch.')}": functools.partial(_gelu, width, dtype)
    for width in (1000, 3072)
    for dtype in (torch.bfloat16, torch.float32)
}
