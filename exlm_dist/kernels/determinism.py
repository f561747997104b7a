"""What torch must be told so that a GPU computes the same bits every time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.utils.deterministic


def compute_repeatably() -> None:
    """From here on every operation of this process on a GPU repeats to the bit, as those of a CPU do anyway.

    Resuming a run exactly rests on this. By default torch sums the gradient of an embedding in an order that changes
    from call to call (measured: docs/lab-log.md), and cuBLAS may where several streams have one workspace. An
    operation without a form that repeats warns, once, and runs. Call it before the first product on a GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_deterministic_debug_mode("warn")
    # torch would also fill fresh memory with NaN, to find readers of what nobody wrote; that costs a pass over it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """`compute_repeatably` for what is done inside, where `device` is a GPU; torch is left as it was found."""
    if device.type != "cuda":
        yield
        return
    mode, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    compute_repeatably()
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
