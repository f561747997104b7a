"""Checks of shapes for all operations; values are only checked on a CPU (elsewhere the host would wait for them)."""

from __future__ import annotations

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """ValueError unless `tensor` has the `expected` shape (None: any size)."""
    shape = tensor.shape
    if shape == expected:  # a tenth of the time, and every operation of a step checks
        return
    if len(shape) == len(expected) and all(want is None or want == size for want, size in zip(expected, shape)):
        return
    wanted = ", ".join("any" if size is None else str(size) for size in expected)
    raise ValueError(f"{name} has shape {list(shape)}, expected [{wanted}]")


def check_segments(name: str, starts: Tensor, total: int, longest: int) -> None:
    """ValueError unless `starts` [B+1] are int64 cumulative lengths within `total`, none longer than `longest`."""
    if starts.dim() != 1 or len(starts) < 2 or starts.dtype != torch.int64:
        raise ValueError(f"{name} must be int64 [B+1] with B >= 1, got {starts.dtype} of shape {list(starts.shape)}")
    if starts.device.type != "cpu":
        return
    lengths = starts.diff()
    if int(starts[0]) != 0 or int(lengths.min()) < 0:
        raise ValueError(f"{name} must start at 0 and never fall, got {starts.tolist()}")
    if int(starts[-1]) > total:
        raise ValueError(f"{name} ends at {int(starts[-1])}, but there are only {total} rows")
    if int(lengths.max()) > longest:
        raise ValueError(f"{name} has a sequence of {int(lengths.max())}, but the stated maximum is {longest}")


def work_dtype(tensor: Tensor) -> torch.dtype:
    """The type to compute in: float32, or float64 for float64 tensors."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
