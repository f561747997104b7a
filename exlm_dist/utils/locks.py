"""Locks on files that the kernel gives back when their process ends, on file systems that have them."""

from __future__ import annotations

import errno
import fcntl
import os

from exlm_dist.utils.logs import get_logger

#: What a file system without such locks answers: Lustre mounted without `-o flock`, NFS without its lock daemon.
_ABSENT = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
#: Devices (`st_dev`) of the file systems without locks that a warning has named.
_named: set[int] = set()
_log = get_logger(__name__)


def lock(handle: int, path: str | os.PathLike[str], *, wait: bool = False) -> bool:
    """Lock the open file `handle`, at `path`, for this process alone. False where its file system has no locks: nothing
    is locked then, and the first time a warning says what that means.

    BlockingIOError if another process has locked it, unless it is to `wait` for that one.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        why = error.strerror
    device = os.fstat(handle).st_dev
    if device not in _named:
        _named.add(device)
        _log.warning(
            "the file system of %s has no file locks (%s; Lustre: mount it with -o flock): a second process that "
            "writes to the same folder is not refused. Start each run once.",
            path,
            why,
        )
    return False
