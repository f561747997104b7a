"""`evaluate_suite`: checkpoints x tasks x splits x grid x seeds in one call, which goes on after a kill."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from pathlib import Path

from exlm_dist.inference.loading import visible_devices
from exlm_dist.suites.catalogue import SUITES
from exlm_dist.suites.cell_runner import Order, embed_order, settings_of
from exlm_dist.suites.cells import Busy, Cell, publish_failure, read_result
from exlm_dist.suites.grid import Point, read_grid
from exlm_dist.suites.methods import Method, find_methods
from exlm_dist.suites.out_folder import PreparedTask, open_folder, prepare_tasks
from exlm_dist.suites.suite import Suite
from exlm_dist.suites.worker_pool import BUSY, DONE, FAILED, PRESENT, CellOrder, Outcome, Slot, run_orders
from exlm_dist.utils.cores import available_cores
from exlm_dist.utils.errors import ConfigError, UserError


@dataclass(frozen=True)
class SuiteRequest:
    """What is to be evaluated, as `exlm evaluate SUITE` is given it.

    Args:
        checkpoints: run folders, checkpoints, `random`, names of the suite's baselines. tasks, splits, protocol: none
        given stands for the suite's own. grid: NAME=VALUE,VALUE. frozen, frozen_only, embed_once: see
        `find_methods`. jobs: cells at a time; None: as many as there are devices. device: 'auto', 'cpu', 'cuda',
        'cuda:1'. pinned: of checkpoints, by the names given, where their files are for as long as the evaluation takes.
        chemprop: its program, where it is not on the PATH.
    """

    suite: str
    checkpoints: Sequence[str]
    data: Path
    out: Path
    tasks: Sequence[str] = ()
    splits: Sequence[str] = ()
    protocol: str | None = None
    grid: Sequence[str] = ()
    seeds: int = 3
    frozen: bool = False
    frozen_only: bool = False
    embed_once: bool = False
    jobs: int | None = None
    device: str = "auto"
    pinned: Mapping[str, Path] = field(default_factory=dict)
    chemprop: Path | None = None


@dataclass(frozen=True)
class Summary:
    """How an evaluation has ended: numbers of cells that were computed now, were there before, are being computed by
    other processes, and have failed (a split that cannot be used counts as one)."""

    computed: int
    present: int
    busy: int
    failed: int

    def plus(self, other: Summary) -> Summary:
        """Of two evaluations, one after the other."""
        pairs = zip(astuple(self), astuple(other))
        return Summary(*(one + more for one, more in pairs))

    def __str__(self) -> str:
        busy = f", {self.busy} left to other processes, which were computing them" if self.busy else ""
        failed = f", {self.failed} failed and are tried again when the same is given again" if self.failed else ""
        return f"cells: {self.computed} computed, {self.present} were there before{busy}{failed}"


def evaluate_suite(request: SuiteRequest, say: Callable[[str], None] = print) -> Summary:
    """Compute all cells of the request that have no result yet. A cell that fails is recorded with its reason and
    costs the others nothing. Errors: see `find_methods`, `read_grid`, `open_folder`, `prepare_tasks`."""
    plan = open_evaluation(request)
    suite, splits, protocol = plan.suite, plan.splits, plan.protocol
    methods = find_methods(
        request.checkpoints,
        suite,
        frozen=request.frozen,
        frozen_only=request.frozen_only,
        embed_once=request.embed_once,
        pinned=request.pinned,
        chemprop=request.chemprop,
    )
    prepared, missing = prepare_tasks(suite, request.tasks, request.data, splits, request.out)
    if missing:
        say(f"skipped, no file in {request.data}: {', '.join(missing)} ({len(missing)} of {len(suite.tasks)} tasks)")
    for line in _described(prepared):
        say(line)
    cells = _planned(prepared, splits, methods, plan.points, request.seeds)
    for task in prepared:
        for cell in cells[task.task.name]:
            if cell.split in task.problems:
                publish_failure(cell.path(request.out), cell, task.problems[cell.split])
    orders = [
        Order(request.out, suite.name, protocol, task.files, task.splits[cell.split], cell)
        for task in prepared
        for cell in cells[task.task.name]
        if cell.split in task.splits
    ]
    for order in orders:
        settings_of(suite.name, protocol, order.cell)  # before anything is computed: values out of range
    slots = find_slots(request.device, request.jobs)
    if request.embed_once:
        _embed(orders, slots[0].device, say)
    unusable = sum(len(task.problems) for task in prepared)
    return compute_orders(orders, slots, unusable, say, _said)


@dataclass(frozen=True)
class _Plan:
    """What a request leaves to the suite, decided."""

    suite: Suite
    splits: list[str]
    protocol: str
    points: list[Point]


def open_evaluation(request: SuiteRequest) -> _Plan:
    """Check a request, and make its folder or go on in it. Errors: see `read_grid`, `open_folder`."""
    suite = SUITES[request.suite]
    splits = list(dict.fromkeys(request.splits or suite.default_splits))
    for name in splits:
        if name not in suite.splits:
            raise ConfigError(f"{suite.name} has no split {name!r}; it has {', '.join(suite.splits)}.")
    protocol = request.protocol or suite.protocols[0]
    if request.embed_once and not suite.embed_once:
        raise ConfigError(f"--embed-once is for molecules with labels, which {suite.name} does not have. Leave it out.")
    if protocol not in suite.protocols:
        raise ConfigError(f"{suite.name} has no protocol {protocol!r}; it has {', '.join(suite.protocols)}.")
    plan = _Plan(suite, splits, protocol, read_grid(request.grid))
    grid = [[list(pair) for pair in point] for point in plan.points]
    open_folder(request.out, {"suite": suite.name, "protocol": protocol, "grid": grid})
    return plan


def _described(prepared: Sequence[PreparedTask]) -> list[str]:
    lines = []
    for task in prepared:
        lines.append(f"{task.task.name}: {' '.join(map(str, task.files))}")
        lines += [f"  {split}: cannot be used: {reason}" for split, reason in task.problems.items()]
    return lines


def _planned(
    prepared: Sequence[PreparedTask],
    splits: Sequence[str],
    methods: Sequence[Method],
    points: Sequence[Point],
    seeds: int,
) -> dict[str, list[Cell]]:
    """The cells of each task, in an order in which what is loaded can be used again. The grid is of trainings: it does
    not apply to a baseline and to linear probes."""
    return {
        task.task.name: [
            Cell(task.task.name, split, method, point, seed)
            for method in methods
            for split in splits
            for point in (points if method.trained else [()])
            for seed in range(seeds if method.seeded else 1)
        ]
        for task in prepared
    }


def _embed(orders: Sequence[Order], device: str, say: Callable[[str], None]) -> None:
    """Embed what probes without a result need, with all cores at one checkpoint. What another process is embedding is
    left to it; what fails, fails again as the cell that it is for."""
    for order in orders:
        if order.cell.method.probe and not order.cell.path(order.out).exists():
            started = time.monotonic()
            with suppress(Busy, UserError):
                if count := embed_order(order, device):
                    seed = f" seed {order.cell.seed}" if order.cell.method.seeded else ""
                    what = f"{order.cell.task} {order.cell.method.label}{seed}"
                    say(f"{what}: {count} molecules embedded in {time.monotonic() - started:.1f} s")


def find_slots(device: str, jobs: int | None) -> list[Slot]:
    """As many as `jobs` says; by default one for each GPU, or for each core where there is none."""
    devices, cores = visible_devices(device), available_cores()
    jobs = jobs or (cores if devices == ["cpu"] else len(devices))
    return [Slot(devices[number % len(devices)], max(1, cores // jobs)) for number in range(jobs)]


def compute_orders(
    orders: Sequence[CellOrder],
    slots: Sequence[Slot],
    unusable: int,
    say: Callable[[str], None],
    said: Callable[[Outcome], str],
) -> Summary:
    """Compute the cells that have no result, and say of each in a line how it has ended. unusable: cells that have
    failed already."""
    left = [order for order in orders if not order.cell.path(order.out).exists()]
    present = len(orders) - len(left)
    say(f"{len(orders)} cells: {present} computed before, {len(left)} to do, {len(slots)} at a time")
    counts = {DONE: 0, PRESENT: 0, BUSY: 0, FAILED: 0}
    started = time.monotonic()
    for number, outcome in enumerate(run_orders(left, slots), 1):
        counts[outcome.state] += 1
        rest = (time.monotonic() - started) / number * (len(left) - number)
        say(f"[{number}/{len(left)}, {rest / 60:.1f} min left] {outcome.order.cell}: {_ended(outcome, said)}")
    return Summary(counts[DONE], present + counts[PRESENT], counts[BUSY], counts[FAILED] + unusable)


def _ended(outcome: Outcome, said: Callable[[Outcome], str]) -> str:
    """How a cell has ended, in a line."""
    if outcome.state == BUSY:
        return "another process is computing it"
    if outcome.state == FAILED:
        return f"failed: {outcome.reason}"
    return said(outcome)


def _said(outcome: Outcome) -> str:
    """What has come out of a cell."""
    result = read_result(outcome.order.cell.path(outcome.order.out))
    metric = result["metric"]
    figures = ", ".join(
        f"{part} {metric} {'undefined' if own[metric] is None else format(own[metric], '.4f')}"
        for part, own in result["scores"].items()
    )
    best = f", epoch {result['best_epoch']} of {result['epochs']}" if "epochs" in result else ""
    twin = result.get("same_rows_as")
    spent = f"{result['seconds']:.1f} s" if twin is None else f"the same rows as {twin}: not computed again"
    return f"{figures}{best}, {spent}"
