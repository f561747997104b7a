"""How long the parts of this run take, so that it can stop in time."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping

from exlm_dist.launch import heartbeat

#: Steps whose slowest counts.
RECENT = 100


class Pace:
    """Measures phases of the loop and tells the watchdog which one the rank is in."""

    def __init__(self, expected_save: float) -> None:
        """`expected_save`: seconds to assume for a save until one was measured."""
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._longest = {"save": 0.0, "evaluation": 0.0}
        self._expected_save = expected_save
        self._started = False

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Be in phase `name` (step, save, evaluation) inside. The first step, which compiles, belongs to `start`."""
        begun = time.monotonic()
        with heartbeat.phase(name) if name != "step" or self._started else contextlib.nullcontext():
            yield
        seconds = time.monotonic() - begun
        if name != "step":
            self._longest[name] = max(self._longest[name], seconds)
        elif self._started:
            self._steps.append(seconds)
        self._started = True

    def seconds_to_safety(self, due: Mapping[str, bool]) -> float:
        """Seconds until the next step edge is behind us and saved, if the loop goes on now; `due`: what comes before that
        step."""
        save = self._longest["save"] or self._expected_save
        before = save * due["save"] + self._longest["evaluation"] * due["evaluation"]
        return before + max(self._steps, default=0.0) + save
