"""A folder of output appears as a whole or not at all: written to a hidden folder beside it, flushed, renamed once.

The hidden folder `.NAME.XXXXXXXX.partial` is locked (flock) while its writer is alive, so that the next run can tell
the leftovers of an interrupted run from a folder that is still being written, and delete only the former.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from exlm_dist.utils.errors import OutputError
from exlm_dist.utils.files import sync_path
from exlm_dist.utils.logs import get_logger

_log = get_logger(__name__)
#: The disk, the quota or the largest allowed file is full.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY)


@dataclass(frozen=True)
class FolderKind:
    """A kind of output: what a message calls it ("a folder of prepared data"), and whether a folder is one."""

    name: str
    matches: Callable[[Path], bool]


@contextmanager
def staged_folder(out: Path, kind: FolderKind, *, overwrite: bool) -> Iterator[Path]:
    """A new folder to write to; renamed to `out` if the block succeeds, deleted if it fails.

    Only a folder of the same kind is ever replaced. OutputError if `out` may not be replaced or cannot be written, and
    if the disk is full.
    """
    out = Path(os.path.realpath(out))
    check_target(out, kind, overwrite)
    descriptor = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise _cannot_write(error, out) from error
    try:
        folder.chmod(0o755)
        descriptor = _lock(folder)
        yield folder
        _publish(folder, out, kind, overwrite)
    except OSError as error:
        if error.errno in FULL or error.errno in _FORBIDDEN:
            raise _cannot_write(error, out) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def remove_leftovers(out: Path) -> None:
    """Delete the hidden folders of interrupted runs for `out`; those that a running process has locked stay."""
    for folder in out.parent.glob(f".{_escaped(out.name)}.*.partial"):
        descriptor = _lock(folder)
        if descriptor is not None:
            _log.info("removing what an interrupted run left: %s", folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def check_target(out: Path, kind: FolderKind, overwrite: bool) -> None:
    """OutputError unless `out` may be written: it is not there, or empty, or `overwrite` and of the same kind."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not kind.matches(out):
        raise OutputError(f"{out}: exists and is not {kind.name}. Choose another --out, or remove it yourself.")
    if not overwrite:
        raise OutputError(f"{out}: is {kind.name} already. Choose another --out, or replace it with --overwrite.")


def _publish(folder: Path, out: Path, kind: FolderKind, overwrite: bool) -> None:
    for inner in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync_path(inner)
    check_target(out, kind, overwrite)
    old = None
    if out.exists() and kind.matches(out):
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        os.rename(out, old)
    os.rename(folder, out)
    sync_path(out.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _lock(folder: Path) -> int | None:
    """File descriptor that locks `folder`; None if another process has locked it or the file system has no locks."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _cannot_write(error: OSError, out: Path) -> OutputError:
    if error.errno in FULL:
        parent = next(path for path in (out.parent, *out.parents) if path.exists())
        free = shutil.disk_usage(parent).free / 1e6
        return OutputError(
            f"{out}: no space left while writing ({error.strerror}; {free:,.1f} MB free now). Free some, or choose "
            "another --out; no unfinished folder was left behind."
        )
    where = error.filename if error.filename and Path(error.filename).exists() else out.parent
    return OutputError(f"{where}: {error.strerror}. Choose an --out that can be written.")


def _escaped(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)
