"""One way to start a Triton kernel, so that every launch can also be recorded and compiled without a GPU.

Under `record_launches` an operation's own code runs on tensors of the meta device, and what it would have launched is
collected with the types it would have passed; `tests/kernels/ahead_of_time.py` compiles that. So a shipped
configuration cannot differ from the compiled one.

When Triton starts a kernel by name, it binds and inspects every argument, writes its settings out as text and compares
the globals of the source, which takes longer than the launch itself. Here the compiled kernel is cached by what Triton
compiles for (`_kind`) and called directly; the call takes the current device and stream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.runtime import JITFunction, driver
from triton.tools.tensor_descriptor import TensorDescriptor

DEFAULT_CAPABILITY = (9, 0)
#: Settings of the compiler for all kernels. a * b + c is rounded once, whatever a version of Triton does by default.
COMMON = {"enable_fp_fusion": True}


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
    keep: Callable[[Launch], Any]
    kept: list[Any]


_recording: _Recording | None = None


@dataclass(frozen=True)
class _Known:
    """A kernel, the order of what it takes, and its compiled forms."""

    kernel: JITFunction  # kept alive, so that its id is not reused
    arguments: list[str]
    constants: list[str]
    compiled: dict[tuple[Hashable, ...], Any] = field(default_factory=dict)

    @classmethod
    def of(cls, kernel: JITFunction) -> _Known:
        """Of a kernel whose compile-time constants come last."""
        names = kernel.arg_names
        count = len(names) - len(kernel.constexprs)
        assert list(kernel.constexprs) == list(range(count, len(names))), f"{kernel.__name__}: constants must come last"
        return cls(kernel, names[:count], names[count:])


_known: dict[int, _Known] = {}


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
    """Start `kernel` on `grid` (nothing if a dimension of it is 0), or record it inside `record_launches`.

    `registers` caps the registers of a thread, so that more programs fit on a multiprocessor (None: no cap).
    """
    if _recording is not None:
        _recording.kept.append(_recording.keep(Launch(kernel, arguments, constants, warps, stages, registers)))
    elif all(grid):
        if isinstance(kernel, JITFunction):
            _start(kernel, grid, arguments, constants, warps, stages, registers)
        else:  # the interpreter
            kernel[grid](**arguments, **constants)


def _start(
    kernel: JITFunction, grid: tuple[int, ...], arguments: dict[str, Any], constants: dict[str, Any],
    warps: int, stages: int, registers: int | None,
) -> None:  # fmt: skip
    """Through Triton the first time, which compiles; then by what it compiled for arguments of these kinds."""
    known = _known.get(id(kernel))
    if known is None:
        known = _known[id(kernel)] = _Known.of(kernel)
    values = [arguments[name] for name in known.arguments]
    fixed = [constants[name] for name in known.constants]
    key = (driver.active.get_current_device(), warps, stages, registers, *fixed, *[_kind(value) for value in values])
    compiled = known.compiled.get(key)
    if compiled is None:
        settings = {"num_warps": warps, "num_stages": stages, "maxnreg": registers, **COMMON}
        known.compiled[key] = kernel[grid](**arguments, **constants, **settings)
    else:
        compiled[(*grid, 1, 1)[:3]](*values, *fixed)


def _kind(value: Any) -> Hashable:
    """What Triton's machine code depends on in an argument: equal kinds, equal code (the reverse need not be true)."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if type(value) is int:
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, *value.block_shape
    return type(value)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability to pick a configuration for: of the recording, else of the GPU, else the default."""
    if _recording is not None:
        return _recording.capability
    return _capability(device) if device.type == "cuda" else DEFAULT_CAPABILITY


_capability = functools.cache(torch.cuda.get_device_capability)


def cdiv(total: int, part: int) -> int:
    """How many parts cover the total. (Triton's own also runs in kernels and takes as long as a small torch op.)"""
    return -(-total // part)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is not below `size` (at least 1)."""
    return 1 << (size - 1).bit_length()


def _all(item: Launch) -> Launch:
    return item


@contextmanager
def record_launches(target: tuple[int, int], keep: Callable[[Launch], Any] = _all) -> Iterator[list[Any]]:
    """Collect launches as for compute capability `target` instead of making them (not for several threads at once).

    `keep` says what of a launch goes into the list: by default all of it, and its tensors stay alive.
    """
    global _recording
    assert _recording is None, "recordings do not nest"
    _recording = _Recording(target, keep, [])
    try:
        yield _recording.kept
    finally:
        _recording = None
