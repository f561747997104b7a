"""Which form of an operation runs: tuned plain torch (`torch.py`, for CPUs) or its Triton kernels (`triton`, for GPUs).

`naive.py` is no backend: it is the definition, which both are tested against.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

from exlm_dist.utils.errors import ConfigError

BACKENDS = ("auto", "triton", "torch")


@functools.cache
def has_triton(operation: str) -> bool:
    """Whether `operation` ("attention", "transitions", "vocab", "dag") has Triton kernels and triton is installed."""
    has_kernels = importlib.util.find_spec(f"{__package__}.{operation}.triton") is not None
    return has_kernels and importlib.util.find_spec("triton") is not None


def resolve_backend(operation: str, backend: str, device: torch.device) -> str:
    """`torch` or `triton` for tensors on `device`; `auto` is triton on CUDA where it exists, else torch.

    Raises ConfigError for an unknown backend, and for `triton` where there is no such kernel.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"kernels.backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return "triton" if device.type == "cuda" and has_triton(operation) else "torch"
    if backend == "triton" and not has_triton(operation):
        raise ConfigError(
            f"kernels.backend is 'triton', but {operation} has no Triton kernels here (kernels missing, or the "
            f"triton package is not installed); use 'auto' or 'torch'"
        )
    return backend


def implementation(operation: str, backend: str, device: torch.device) -> ModuleType:
    """The module (`torch` or `triton`) whose functions compute `operation` for tensors on `device`."""
    return importlib.import_module(f"{__package__}.{operation}.{resolve_backend(operation, backend, device)}")
