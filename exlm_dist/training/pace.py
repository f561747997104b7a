"""How long the phases of this run take, so that it can stop in time, and which one it is in, for the watchdog."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator

from exlm_dist.launch import heartbeat

#: Number of recent steps of which the slowest counts.
RECENT = 100


class Pace:
    """Measures the phases of the loop."""

    def __init__(self) -> None:
        self._seconds: dict[str, deque[float]] = {}
        self._started = False

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run the body in phase `name` (step, save, evaluation). The first step, which compiles, is of the start."""
        compiles = not self._started and name == "step"
        begun = time.monotonic()
        with contextlib.nullcontext() if compiles else heartbeat.phase(name):
            yield
        self._started = True
        if not compiles:
            self._seconds.setdefault(name, deque(maxlen=RECENT)).append(time.monotonic() - begun)

    def until_next_edge(self, evaluate: bool) -> float:
        """Seconds from the end of a step to the end of the next, by the slowest recent ones; `evaluate`: with an
        evaluation in between."""
        parts = ["step", "evaluation"] if evaluate else ["step"]
        return sum(max(self._seconds.get(name, [0.0])) for name in parts)
