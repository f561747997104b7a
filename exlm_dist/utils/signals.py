"""Signals between the processes of a run: which ask it to save and end, and that no child outlives its parent."""

import contextlib
import ctypes
import os
import signal
import stat
import sys
from types import FrameType

#: Caught by the ranks, blocked in the processes that write checkpoints. TERM: preemption, `kill`; USR1: Slurm's warning
#: before the time limit; INT: Ctrl-C; HUP: the terminal was closed.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


def caught_signals() -> list[signal.Signals]:
    """Those of `SIGNALS` to be caught here: all, but SIGHUP where `nohup` has it ignored."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def exit_by_signals() -> None:
    """From now on SIGTERM and a closed terminal end this process as an exit does, with 128 + the signal, so that what
    is half written is removed on the way out. Commands that have something to save catch them themselves."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough: the way out is not to be interrupted
    if number == signal.SIGHUP:
        leave_lost_terminal()
    sys.exit(128 + number)


def leave_lost_terminal() -> None:
    """After a SIGHUP: what is written to a standard output whose terminal is gone is dropped from now on, as every such
    write would fail."""
    for handle in (1, 2):
        with contextlib.suppress(OSError):  # it was closed before
            if stat.S_ISCHR(os.fstat(handle).st_mode) and not os.isatty(handle):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, handle)
                os.close(nowhere)


def die_with_parent() -> None:
    """Have the kernel kill this process as soon as the thread that started it ends. Linux only; elsewhere: nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
