"""The cases of the vocabulary match that are compiled ahead of time: widths of the shipped models, types."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from exlm_dist.kernels.vocab import match_scores

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _run(width: int, dtype: torch.dtype) -> None:
    hidden = torch.empty(2496, width, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(50304, width, dtype=dtype, device="meta", requires_grad=True)
    bias = torch.empty(50304, dtype=dtype, device="meta", requires_grad=True)
    ids, starts = torch.empty(624, dtype=torch.int64, device="meta"), torch.empty(9, dtype=torch.int64, device="meta")
    match_scores(hidden, weight, bias, ids, starts, starts, 312, 78, backend="triton").sum().backward()


CASES: dict[str, Callable[[], None]] = {
    f"D{width} {name}": functools.partial(_run, width, dtype)
    for name, dtype in TYPES.items()
    for width in (200, 512, 768, 1024)
}
