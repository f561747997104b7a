"""Whether an output can be written, found out before the work is done; and paths as people give them."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from exlm_dist.utils.errors import OutputError


def user_path(path: Path | str) -> Path:
    """`path` with a leading `~` or `~user` expanded, as shells do for words but not for `--out=~/x` or in YAML."""
    return Path(os.path.expanduser(path))


def nearest_folder(path: Path) -> Path:
    """The folder that exists at or above `path`; where a file stands in its way, that file."""
    path = Path(os.path.realpath(path))
    return next(parent for parent in (path, *path.parents) if parent.exists())


def must_stay(folder: Path) -> bool:
    """Whether `folder` is there and cannot be renamed or replaced as a whole: a mount point, or one in a folder of
    others."""
    return folder.is_dir() and (os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK))


def check_writable(out: Path) -> None:
    """OutputError unless a file or folder `out`, whose parents may be missing, can be made: tried by a temporary
    file, as permissions alone do not tell (read-only and full file systems, quotas)."""
    folder = nearest_folder(Path(os.path.realpath(out)).parent)
    if not folder.is_dir():
        raise OutputError(f"{out}: cannot be made, as {folder} is a file. Choose another place.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"{out}: cannot be made: nothing can be written in {folder} ({error.strerror}). Choose another place."
        ) from error


def check_space(out: Path, needed: int, what: str) -> None:
    """OutputError, with both figures, unless `needed` bytes, those of `what`, are free where `out` is to be."""
    folder = nearest_folder(out)
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OutputError(
            f"{out}: {what} takes {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free in {folder}. Free some, or "
            "choose a place on another file system."
        )
