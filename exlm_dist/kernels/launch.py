"""One way to start a Triton kernel, so that every launch can also be recorded and compiled without a GPU.

`record_launches` runs an operation's own code on tensors of the meta device and collects what it would have launched,
with the types it would have passed; `tests/kernels/ahead_of_time.py` compiles those. A shipped configuration can
therefore not differ from the compiled one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

DEFAULT_CAPABILITY = (9, 0)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: run-time arguments, compile-time constants and settings of the compiler."""

    kernel: Callable[..., Any]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int | None = None


@dataclass
class _Recording:
    capability: tuple[int, int]
    launches: list[Launch]


_recording: _Recording | None = None


def launch(
    kernel: Callable[..., Any],
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    *,
    warps: int = 4,
    stages: int = 2,
    registers: int | None = None,
) -> None:
    """Start `kernel` on `grid` (nothing happens where a side of it is 0), or record it inside `record_launches`.

    `registers` caps the registers of a thread, so that more programs share a multiprocessor (None: no cap).
    """
    if _recording is not None:
        _recording.launches.append(Launch(kernel, arguments, constants, warps, stages, registers))
    elif all(grid):
        kernel[grid](**arguments, **constants, num_warps=warps, num_stages=stages, maxnreg=registers)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability to pick a configuration for: of the GPU, of the recording, or the default without either."""
    if _recording is not None:
        return _recording.capability
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)
    return DEFAULT_CAPABILITY


@contextmanager
def record_launches(target: tuple[int, int]) -> Iterator[list[Launch]]:
    """Collect launches as for compute capability `target` instead of making them (not for several threads at once)."""
    global _recording
    assert _recording is None, "recordings do not nest"
    _recording = _Recording(target, [])
    try:
        yield _recording.launches
    finally:
        _recording = None
