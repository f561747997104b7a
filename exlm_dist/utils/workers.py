"""A function over many items in several processes: results in order, a bounded number of items in flight."""

from __future__ import annotations

import errno
import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import TypeVar

from exlm_dist.utils.errors import EXIT_RETRY, DataError
from exlm_dist.utils.signals import die_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`function` (which must be picklable) of every item, in the order of the items for any number of `workers`.

    With one worker or one item it runs in this process. Worker processes are spawned, because forking a process that
    has threads can hang; they end with this one, however it ends. Raises DataError if a worker dies or cannot be
    started.
    """
    items = iter(items)
    first = list(islice(items, 2))
    items = chain(first, items)
    if workers <= 1 or len(first) < 2:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(_submit(pool, function, item))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a worker process died (killed for memory?). Use fewer --workers, or free memory.") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class WorkerLost(DataError):
    """A worker process that died or hangs; a later start may succeed."""

    exit_code = EXIT_RETRY


class WorkerPool:
    """Worker processes that stay, for the short tasks of a process that goes on. They end with the thread that makes
    the pool."""

    def __init__(self, workers: int):
        self.workers = workers
        self._pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)
        # All at once and here: a worker that another thread started, such as one that reads ahead, would end with that.
        self._started = [_submit(self._pool, abs, 0) for _ in range(workers)]

    def map(self, function: Callable[[Item], Result], items: Sequence[Item], seconds: float) -> list[Result]:
        """`function` (picklable) of every item, in order. WorkerLost if a worker died or none answers in time."""
        try:
            for started in self._started:
                started.result(seconds)
            return list(self._pool.map(function, items, timeout=seconds))
        except BrokenProcessPool as error:
            raise WorkerLost("a worker process that reads data died (killed for memory?). Start again.") from error
        except TimeoutError as error:
            raise WorkerLost(f"the worker processes that read data gave nothing within {seconds:g} s.") from error

    def close(self, limit: float = 10.0) -> None:
        """End the workers, for which it waits at most `limit` seconds; they never keep the process alive."""
        ending = threading.Thread(target=self._pool.shutdown, kwargs={"cancel_futures": True}, daemon=True)
        ending.start()
        ending.join(limit)


def _begin() -> None:
    """Of a worker process: Ctrl-C ends it at once without a word, and it does not outlive the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_parent()


def _submit(pool: ProcessPoolExecutor, function: Callable[[Item], Result], item: Item) -> Future[Result]:
    """`pool.submit`, which may start a worker. DataError if the system lets no more processes start."""
    try:
        return pool.submit(function, item)
    except (OSError, RuntimeError) as error:
        limited = isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE)
        if limited or "can't start new thread" in str(error):
            raise DataError(f"no more worker processes can be started here ({error}). Use --workers 1.") from error
        raise
