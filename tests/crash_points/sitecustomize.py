"""Makes one system call of the process that writes checkpoints fail: Python imports this at its start when the folder is
on PYTHONPATH.

EXLM_CRASH_POINT is `CALL:NUMBER:HOW`: the NUMBER-th call of os.CALL fails as HOW says: `error` (no space left), `kill`
(SIGKILL of this process), `rank` (SIGKILL of the rank it writes for), `hang` (it never returns).
"""

import errno
import os
import signal
import sys
import time

WRITER = "exlm_dist.training.checkpoint_writer"


def crash(how):
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
            crash(how)
        return plain(*arguments, **keywords)

    setattr(os, name, call)


if WRITER in sys.orig_argv and "EXLM_CRASH_POINT" in os.environ:
    arm(os.environ["EXLM_CRASH_POINT"])
