"""Micro-batches side by side on the cores of a CPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_cores(function: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> Iterator[Result]:
    """`function` of every item without gradients, in the order of the items; on a CPU one item on each core at a time.

    As many as torch has threads (`torch.set_num_threads`), which would otherwise all work at one operation and wait for
    each other at its end, spinning: beside any other process that costs many times what they gain. A single item is
    left to all of them.
    """
    function = torch.inference_mode()(function)
    threads = torch.get_num_threads()
    items = iter(items)
    first = list(islice(items, 2))
    items = chain(first, items)
    if device.type != "cpu" or threads == 1 or len(first) < 2:
        yield from map(function, items)
        return
    # The setting is that of the thread that makes it, and what threads start with.
    pool = ThreadPoolExecutor(threads, "core", initializer=torch.set_num_threads, initargs=(1,))
    try:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)
