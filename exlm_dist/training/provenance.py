"""What made a checkpoint: versions, commit, configuration."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

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


@functools.cache
def git_commit() -> str:
    """Commit of the checkout this package runs from, `+` appended where it was altered; empty for an installed
    package. Looked at once: what is running is what was imported."""
    root = Path(exlm_dist.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+" if commit and _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""  # no git here, or too slow: the version above has to do


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
    ).stdout.strip()


def config_hash(text: str) -> str:
    """SHA-256 of the resolved configuration as it is dumped."""
    return hashlib.sha256(text.encode()).hexdigest()
