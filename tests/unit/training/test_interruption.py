"""Signals become a flag."""

from __future__ import annotations

import os
import pty
import signal
import sys
import time

import pytest

from exlm_dist.training.interruption import Interruption


class Alone:
    def any(self, flag):
        return flag


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_noted_and_agreed(number, capfd):
    former = signal.getsignal(number)
    interruption = Interruption()
    try:
        assert not interruption.agreed(Alone())
        os.kill(os.getpid(), number)
        assert interruption.agreed(Alone()) and number.name in capfd.readouterr().err
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    finally:
        interruption.restore()
    assert signal.getsignal(number) == former


def test_a_closed_terminal_asks_to_save_and_fails_no_write():
    """A process whose terminal is closed hears of it, writes on to the terminal that is gone, and ends as it wants."""
    code = (
        "import os, sys, time; from exlm_dist.training.interruption import Interruption\n"
        "interruption = Interruption(); print('ready', flush=True)\n"
        "while interruption.received is None: time.sleep(0.01)\n"
        "print('saved', flush=True); os.write(2, b'saved'); sys.exit(75)"
    )
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", code])
    assert os.read(terminal, 100).startswith(b"ready")
    os.close(terminal)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("it did not end")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(ended[1]) == 75


def test_nohup_is_respected():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interruption = Interruption()
        os.kill(os.getpid(), signal.SIGHUP)
        assert interruption.received is None
        interruption.restore()
    finally:
        signal.signal(signal.SIGHUP, former)
