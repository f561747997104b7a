"""What made a checkpoint: versions and configuration."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform

import exlm_dist

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors")


@functools.cache
def versions() -> dict[str, str]:
    """Versions that may decide the bits of a result."""
    return {
        "exlm_dist": exlm_dist.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def config_hash(text: str) -> str:
    """SHA-256 of the resolved configuration as it is dumped."""
    return hashlib.sha256(text.encode()).hexdigest()
