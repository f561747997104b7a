"""A folder of output appears as a whole or not at all: written to a hidden folder beside it, flushed, renamed once.

A mount point cannot be renamed to, and nothing can be made beside a folder whose parent belongs to others. There the
hidden folder is inside, and what is in it is renamed entry by entry, the one that marks the folder as complete last.

The hidden folder `.NAME.XXXXXXXX.partial` is locked (flock) while its writer is alive, so that the next run can tell
the leftovers of an interrupted run from a folder that is still being written, and delete only the former.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from exlm_dist.utils.errors import OutputError
from exlm_dist.utils.files import sync_path
from exlm_dist.utils.logs import get_logger
from exlm_dist.utils.outputs import check_writable, must_stay

_log = get_logger(__name__)
#: The disk, the quota or the largest allowed file is full.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY)


@dataclass(frozen=True)
class FolderKind:
    """A kind of output: what a message calls it ("a folder of prepared data"), whether a folder is one, and the file
    without which it is none."""

    name: str
    matches: Callable[[Path], bool]
    marker: str


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
        inside = must_stay(out)
        if not inside:
            out.parent.mkdir(parents=True, exist_ok=True)
        _refuse_second(out, remove_leftovers(out))
        folder = _hidden_folder(out, inside)
    except OSError as error:
        raise _cannot_write(error, out) from error
    try:
        folder.chmod(0o755)
        descriptor = _lock(folder)
        yield folder
        (_publish_inside if inside else _publish)(folder, out, kind, overwrite)
    except OSError as error:
        if error.errno in FULL or error.errno in _FORBIDDEN:
            raise _cannot_write(error, out) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _refuse_second(out: Path, busy: list[Path]) -> None:
    if busy:
        raise OutputError(
            f"{out}: another process is writing it ({busy[0]}). Wait for it, end it, or choose another --out."
        )


def remove_leftovers(out: Path) -> list[Path]:
    """Delete the hidden folders of interrupted runs for `out`; those that a running process has locked stay, and are
    returned."""
    busy = []
    pattern = f".{_escaped(out.name)}.*.partial"
    for folder in (*out.parent.glob(pattern), *out.glob(pattern)):
        try:
            descriptor = _lock(folder)
        except BlockingIOError:
            busy.append(folder)
            continue
        if descriptor is not None:
            _log.info("removing what an interrupted run left: %s", folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)
    return busy


def check_target(out: Path, kind: FolderKind, overwrite: bool) -> None:
    """OutputError unless `out` may be written: it is not there, or empty, or `overwrite` and of the same kind."""
    if not out.exists() or (out.is_dir() and not _content(out)):
        return
    if not kind.matches(out):
        raise OutputError(f"{out}: exists and is not {kind.name}. Choose another --out, or remove it yourself.")
    if not overwrite:
        raise OutputError(f"{out}: is {kind.name} already. Choose another --out, or replace it with --overwrite.")


def check_output(out: Path, kind: FolderKind, overwrite: bool) -> None:
    """OutputError unless `staged_folder` will be able to write `out`, as far as that is known beforehand."""
    out = Path(os.path.realpath(out))
    check_target(out, kind, overwrite)
    check_writable(out / "inside" if must_stay(out) else out)


def _hidden_folder(out: Path, inside: bool) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out if inside else out.parent))


def _content(out: Path) -> list[Path]:
    """What is in `out`, but for hidden folders of ours, and what file systems have at their root."""
    hidden = re.compile(rf"\.{re.escape(out.name)}\..*\.partial")
    return [path for path in out.iterdir() if path.name != "lost+found" and not hidden.fullmatch(path.name)]


def _sync_folders(folder: Path) -> None:
    for inner in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync_path(inner)


def _publish_inside(folder: Path, out: Path, kind: FolderKind, overwrite: bool) -> None:
    _sync_folders(folder)
    check_target(out, kind, overwrite)
    old = _hidden_folder(out, inside=True)
    for path in sorted(_content(out), key=lambda path: path.name != kind.marker):
        os.rename(path, old / path.name)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == kind.marker):
        os.rename(path, out / path.name)
    sync_path(out)
    shutil.rmtree(old, ignore_errors=True)


def _publish(folder: Path, out: Path, kind: FolderKind, overwrite: bool) -> None:
    _sync_folders(folder)
    check_target(out, kind, overwrite)
    old = None
    if out.exists() and kind.matches(out):
        old = _hidden_folder(out, inside=False)
        os.rename(out, old)
    os.rename(folder, out)
    sync_path(out.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _lock(folder: Path) -> int | None:
    """File descriptor that locks `folder`; None if it is gone or the file system has no locks. BlockingIOError if
    another process has locked it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def _cannot_write(error: OSError, out: Path) -> OutputError:
    if error.errno == errno.EFBIG:
        return OutputError(
            f"{out}: a file in it would be larger than files may be here. Raise the limit (ulimit -f unlimited), or "
            "choose another file system; no unfinished folder was left behind."
        )
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
