"""Signals become a flag."""

from __future__ import annotations

import os
import signal

import pytest

from exlm_dist.training.interruption import Interruption


class Alone:
    def any(self, flag):
        return flag


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
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
