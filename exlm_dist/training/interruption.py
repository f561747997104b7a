"""Signals become a flag; the flag is acted on at a step edge, by all ranks at the same one."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import TYPE_CHECKING

from exlm_dist.utils.logs import get_logger

if TYPE_CHECKING:
    from exlm_dist.parallel.process import Process

#: TERM: preemption, `kill`; USR1: Slurm's warning before the time limit; INT: Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

logger = get_logger(__name__)


class Interruption:
    """Catches the signals that ask a run to save and end. Build it before anything slow is imported."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt  # the second Ctrl-C means it
        self.received = signal.Signals(number)
        # Not through logging: a handler that interrupts a log call could wait for its own lock.
        os.write(2, f"{self.received.name} received: saving at the next step edge, then ending\n".encode())

    def agreed(self, process: Process) -> bool:
        """Whether any rank was asked to stop. A collective: every rank calls it at every step edge."""
        return process.any(self.received is not None)

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
