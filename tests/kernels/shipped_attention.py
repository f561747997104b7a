"""The cases of attention that are compiled ahead of time: head widths, types and dropout that a run can ask for."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from exlm_dist.kernels.attention import attention_packed

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LONGEST = 1024  # needs every range of lengths


def _run(width: int, dtype: torch.dtype, dropout: float) -> None:
    qkv = torch.empty(4096, 4, 3, width, dtype=dtype, device="meta", requires_grad=True)
    angles = torch.empty(4096, width // 2, device="meta")
    cu_tokens = torch.empty(17, dtype=torch.int64, device="meta")
    bias = torch.empty(4 * 3 * width, dtype=dtype, device="meta", requires_grad=True)
    options = {"bias": bias, "dropout": dropout, "seed": 2**40 + 3, "backend": "triton"}
    out = attention_packed(qkv, angles, cu_tokens, LONGEST, **options)
    out.backward(torch.empty_like(out))


CASES: dict[str, Callable[[], None]] = {
    f"P{width} {name} dropout {dropout}": functools.partial(_run, width, dtype, dropout)
    for name, dtype in TYPES.items()
    for width in (32, 64, 96, 128)
    for dropout in (0.0, 0.1)
}
