"""Makes one system call of the process that writes checkpoints fail: Python imports this at its start when the folder
is on PYTHONPATH.

EXLM_CRASH_POINT is a file that holds `CALL:NUMBER:HOW`; it is removed when the time has come, so it happens once. The
NUMBER-th call of os.CALL fails as HOW says: `error` (no space left), `kill` (SIGKILL of this process), `rank` (SIGKILL
of the rank it writes for), `hang` (it never returns), `slow` (it takes a second).
"""

import errno
import os
import signal
import sys
import time
from pathlib import Path

POINT = Path(os.environ.get("EXLM_CRASH_POINT", "none"))
WRITER = "exlm_dist.checkpoint.writer"


def crash(how):
    if how == "slow":
        time.sleep(1)
        return
    if how == "error":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "rank":
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)  # a killed rank takes this process with it


def arm(point):
    name, number, how = point.split(":")
    plain, calls = getattr(os, name), []

    def call(*arguments, **keywords):
        calls.append(name)
        if len(calls) == int(number):
            POINT.unlink()
            crash(how)
        return plain(*arguments, **keywords)

    setattr(os, name, call)


if WRITER in sys.orig_argv and POINT.is_file():
    arm(POINT.read_text())
