"""Signals and the time limit of the job become a flag, on which all ranks act after the same step."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType
from typing import TYPE_CHECKING

from exlm_dist.config.schema import LaunchConfig
from exlm_dist.launch.deadline import end_of_job
from exlm_dist.utils.logs import get_logger
from exlm_dist.utils.signals import caught_signals, leave_lost_terminal

if TYPE_CHECKING:
    from exlm_dist.parallel.process import Process

logger = get_logger(__name__)


class Deadline:
    """The moment by which the last checkpoint must be on disk."""

    def __init__(self, end: float | None, margin: float) -> None:
        """`end`: Unix time at which the job is ended from outside, None: never; `margin`: seconds before it."""
        self.end, self.margin = end, margin

    @staticmethod
    def of_job(launch: LaunchConfig) -> Deadline:
        """The deadline of this job. Only rank 0 asks: its answer, as every flag, counts for all."""
        first = int(os.environ.get("RANK", "0")) == 0
        return Deadline(end_of_job(launch.time_limit) if first else None, launch.margin)

    def is_near(self, seconds: float) -> bool:
        """Whether something that takes `seconds` would end too late if it began now."""
        return self.end is not None and time.time() + seconds > self.end - self.margin


class Interruption:
    """Catches the signals that ask a run to save and end, and watches the clock. Create it before slow imports."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.deadline = Deadline(None, 0.0)
        self._out_of_time = False
        self._previous = {number: signal.signal(number, self._note) for number in caught_signals()}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt  # the second Ctrl-C means it
        self.received = signal.Signals(number)
        if number == signal.SIGHUP:
            leave_lost_terminal()
        # Not through logging: a handler that interrupts a log call could wait for its own lock.
        with contextlib.suppress(OSError):
            os.write(2, f"{self.received.name} received: saving at the next step edge, then ending\n".encode())

    def agreed(self, process: Process, seconds: float = 0.0) -> bool:
        """Whether any rank was asked to stop, or would pass the deadline in going on for `seconds`.

        A collective: every rank calls it at every step edge.
        """
        if not self._out_of_time and self.deadline.is_near(seconds):
            self._out_of_time = True
            logger.info(
                "the time of the job ends at %s, one more step with a save may take %.0f s (launch.margin %.0f s): "
                "saving now",
                time.strftime("%H:%M:%S", time.localtime(self.deadline.end)),
                seconds,
                self.deadline.margin,
            )
        return process.any(self.received is not None or self._out_of_time)

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
