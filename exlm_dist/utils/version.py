"""The version of the package, for every room (`exlm_dist.__version__` is the same), and the commit it runs from."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

VERSION = "0.1.0"


@functools.cache
def git_commit() -> str:
    """Commit of the checkout this package runs from, `+` appended where it was altered; empty for an installed
    package. Looked at once: what is running is what was imported."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+" if commit and _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""  # no git here, or too slow: the version has to do


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
    ).stdout.strip()
