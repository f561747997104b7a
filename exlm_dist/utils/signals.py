"""Signals between the processes of a run: which ask it to save and end, and that no child outlives its parent."""

import ctypes
import signal
import sys

#: Caught by the ranks, blocked in the processes that write checkpoints. TERM: preemption, `kill`; USR1: Slurm's warning
#: before the time limit; INT: Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process as soon as the thread that started it ends. Linux only; elsewhere: nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
