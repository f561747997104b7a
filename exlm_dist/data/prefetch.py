"""Values of a pure function of the step, computed a few steps ahead by a background thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from exlm_dist.utils.logs import get_logger

Value = TypeVar("Value")
logger = get_logger(__name__)


class Prefetcher(Generic[Value]):
    """`get(t)` returns function(t); meanwhile a thread computes t + 1, ..., t + depth.

    At most `depth` finished values are kept. Asking for another step than the next drops them and starts there: since
    the function is pure, only time is lost. An exception in the thread is raised unchanged by the `get` of its step.
    """

    def __init__(self, function: Callable[[int], Value], depth: int, *, limit: float = 600.0) -> None:
        """`depth` 0 computes in the caller's thread; `limit`: seconds that a `get` may wait."""
        self._function, self._depth, self._limit = function, depth, limit
        self._ready: dict[int, Value | BaseException] = {}
        self._working: int | None = None  # the step being computed; None if none is, or its result is not wanted
        self._next = 0  # the step the thread computes next
        self._end = 0  # one past the last step it may compute
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def get(self, step: int) -> Value:
        """function(step), after at most `limit` seconds (else TimeoutError). RuntimeError once closed."""
        if self._depth == 0:
            return self._function(step)
        with self._changed:
            if self._closed:
                raise RuntimeError("the loader was closed; make a new one")
            self._aim(step)
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: step in self._ready or self._closed, self._limit):
                raise TimeoutError(
                    f"global batch {step} was not read and packed within {self._limit:.0f} s: "
                    "is the storage of the data stuck?"
                )
            if step not in self._ready:
                raise RuntimeError("the loader was closed while a batch was waited for")
            value = self._ready.pop(step)
            self._changed.notify_all()
        if isinstance(value, BaseException):
            raise value
        return value

    def close(self, limit: float = 10.0) -> None:
        """Stop the thread and wait for it at most `limit` seconds; it never keeps the process alive."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(limit)
            if self._thread.is_alive():
                logger.warning("the data thread is still reading after %.0f s; leaving it behind", limit)

    def _aim(self, step: int) -> None:
        """Let the thread run up to step + depth, from `step` on unless that is done, being computed or next already."""
        if step not in self._ready and step not in (self._working, self._next):
            self._ready.clear()
            self._working, self._next = None, step
        self._ready = {ready: value for ready, value in self._ready.items() if ready >= step}
        self._end = step + self._depth + 1
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="exlm-data", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next < self._end)
                if self._closed:
                    return
                step = self._working = self._next
                self._next += 1
            try:
                value: Value | BaseException = self._function(step)
            except BaseException as error:  # handed to the consumer, whatever it is
                value = error
            with self._changed:
                if self._working == step and not self._closed:  # else the consumer has jumped to another step
                    self._ready[step] = value
                    self._working = None
                self._changed.notify_all()
