"""Cells in several processes, each of which may die without taking more than its own cell along."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from exlm_dist.suites.cells import Busy, Cell, publish_failure
from exlm_dist.utils.errors import UserError
from exlm_dist.utils.logs import get_logger
from exlm_dist.utils.signals import die_with_parent

#: Seconds between two lines on what is being computed.
PATIENCE = 60.0
DONE, PRESENT, BUSY, FAILED = "done", "present", "busy", "failed"
logger = get_logger(__name__)


class CellOrder(Protocol):
    """A cell to be computed for the evaluation in the folder `out`."""

    @property
    def out(self) -> Path: ...

    @property
    def cell(self) -> Cell: ...

    def compute(self, device: str, threads: int) -> bool:
        """Compute it and publish its result; False if that was there already. Busy if another process is at it."""


@dataclass(frozen=True)
class Slot:
    """Where one cell at a time is computed."""

    device: str
    threads: int


@dataclass(frozen=True)
class Outcome:
    """How a cell has ended. state: `DONE`, `PRESENT` (another process has computed it meanwhile), `BUSY` (another
    process is computing it) or `FAILED`, then with a reason."""

    order: CellOrder
    state: str
    reason: str = ""


def run_orders(orders: Sequence[CellOrder], slots: Sequence[Slot]) -> Iterator[Outcome]:
    """Compute the cells, in their order as slots become free; the outcome of each as it ends. A failed one is recorded
    in its file. With one slot they are computed in this process. What takes long is named every minute."""
    with _Computing() as computing:
        outcomes = _here(orders, slots[0], computing) if len(slots) == 1 else _in_workers(orders, slots, computing)
        for outcome in outcomes:
            yield _recorded(outcome)


def _here(orders: Sequence[CellOrder], slot: Slot, computing: _Computing) -> Iterator[Outcome]:
    for order in orders:
        computing.begin(order.cell)
        outcome = _attempt(order, slot)
        computing.end(order.cell)
        yield outcome


def _in_workers(orders: Sequence[CellOrder], slots: Sequence[Slot], computing: _Computing) -> Iterator[Outcome]:
    waiting, workers = deque(orders), [_Worker(slot) for slot in slots[: len(orders)]]

    def give(worker: _Worker) -> None:
        computing.begin(waiting[0].cell)
        worker.give(waiting.popleft())

    try:
        for worker in workers:
            give(worker)
        while busy := [worker for worker in workers if worker.order is not None]:
            wait([worker.connection for worker in busy])
            for worker in busy:
                if not worker.connection.poll():
                    continue
                outcome = worker.outcome()
                computing.end(outcome.order.cell)
                yield outcome
                if waiting:
                    give(worker)
    finally:
        for worker in workers:
            worker.end()


class _Computing:
    """The cells that are being computed, which a thread names every `PATIENCE` seconds with their minutes so far."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._say, daemon=True)

    def begin(self, cell: Cell) -> None:
        """A cell from now on."""
        self._since[str(cell)] = time.monotonic()

    def end(self, cell: Cell) -> None:
        """Not any more."""
        del self._since[str(cell)]

    def _say(self) -> None:
        while not self._over.wait(PATIENCE):
            now = time.monotonic()
            long = [
                f"{cell} ({(now - since) / 60:.0f} min)"
                for cell, since in self._since.copy().items()
                if now - since > PATIENCE
            ]
            if long:
                logger.info("still computing: %s", "; ".join(long))

    def __enter__(self) -> _Computing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _attempt(order: CellOrder, slot: Slot) -> Outcome:
    try:
        return Outcome(order, DONE if order.compute(slot.device, slot.threads) else PRESENT)
    except Busy:
        return Outcome(order, BUSY)
    except UserError as error:
        return Outcome(order, FAILED, str(error))
    except Exception as error:  # whatever it is, the other cells go on
        logger.exception("%s failed", order.cell)
        return Outcome(order, FAILED, f"{type(error).__name__}: {error}")


def _recorded(outcome: Outcome) -> Outcome:
    if outcome.state == FAILED:
        publish_failure(outcome.order.cell.path(outcome.order.out), outcome.order.cell, outcome.reason)
    return outcome


class _Worker:
    """A process with a slot, started anew after it has died."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._process: BaseProcess | None = None
        self.connection: Connection
        self.order: CellOrder | None = None

    def give(self, order: CellOrder) -> None:
        """Have it compute a cell."""
        if self._process is None:
            self._start()
        self.order = order
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has just died: `outcome` finds that out
            self.connection.send(order)

    def outcome(self) -> Outcome:
        """That of its cell, which has ended, or its process has."""
        order, self.order = self.order, None
        assert order is not None and self._process is not None
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode or 0
            self._process = None
            if code == -signal.SIGKILL:
                how = "was killed (for memory? Then give fewer --jobs)"
            else:
                how = f"ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"
            return Outcome(order, FAILED, f"its process {how}")

    def end(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, self._slot), daemon=True)
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(self._slot.threads)  # read when the libraries of the process are loaded
        try:
            self._process.start()
        finally:
            os.environ.pop("OMP_NUM_THREADS")
            os.environ.update({} if before is None else {"OMP_NUM_THREADS": before})
        other.close()


def _work(connection: Connection, slot: Slot) -> None:
    """What a process does: compute the cells that it is given, until nobody gives any more."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the parent decides
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            connection.send(_attempt(connection.recv(), slot))
