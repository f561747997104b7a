"""Several ways to compute one thing, checked and then timed side by side in one process."""

from __future__ import annotations

import datetime
import gc
import importlib
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch._dynamo.exc import TorchDynamoException
from triton.errors import TritonError


@dataclass(frozen=True)
class Case:
    """One comparison: `sides[name]()` does the whole work once and returns nothing that matters.

    `error(name)` is the largest relative error of a side's outputs and gradients, which must stay within `bound`; None
    for a side without a reference. `ours` is the side that the others are divided by. `floors` are theoretical times in
    ms by name (bytes or operations over what the device can do), printed with the figures. `whole` is what an obvious
    implementation stores at once, by name and in bytes: peaks are also given as fractions of it.
    """

    name: str
    sizes: str
    ours: str
    sides: dict[str, Callable[[], object]]
    error: Callable[[str], float | None]
    bound: float
    least: float | None = None
    aim: float | None = None
    floors: dict[str, float] = field(default_factory=dict)
    whole: tuple[str, float] | None = None


@dataclass
class Figure:
    """Times of one side in ms (median, first and third quartile), its peak memory over the start in MB, how much of
    that is its results (still allocated when it returns), its error.
    """

    case: str
    sizes: str
    side: str
    median: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    peak: float = float("nan")
    results: float = float("nan")
    error: float | None = None
    ratio: float = float("nan")
    fault: str = ""


def measure(case: Case, device: torch.device, rounds: int, milliseconds: float) -> list[Figure]:
    """Check every side, then time those that passed in turn, `rounds` times about `milliseconds` each."""
    figures = {name: _checked(case, name, device) for name in case.sides}
    sound = [name for name, figure in figures.items() if not figure.fault]
    repeats = {name: _repeats(case.sides[name], device, milliseconds) for name in sound}
    times: dict[str, list[float]] = {name: [] for name in sound}
    for _ in range(rounds):
        for name in sound:
            times[name].append(_time(case.sides[name], device, repeats[name]))
    for name in sound:
        figure = figures[name]
        spread = torch.tensor(times[name]).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        figure.low, figure.median, figure.high = spread
    for figure in figures.values():
        if case.ours in sound:
            figure.ratio = figure.median / figures[case.ours].median
    return list(figures.values())


def _checked(case: Case, name: str, device: torch.device) -> Figure:
    """Run a side once: memory, error; a side that fails is reported and not timed."""
    figure = Figure(case.name, case.sizes, name)
    try:
        figure.error = case.error(name)
        case.sides[name]()
        figure.peak, figure.results = _memory(case.sides[name], device)
    except (RuntimeError, ValueError, TorchDynamoException, TritonError) as error:
        figure.fault = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
        return figure
    if figure.error is not None and not figure.error <= case.bound:
        figure.fault = f"error {figure.error:.1e} over {case.bound:.0e}"
    return figure


def _memory(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Allocated memory over the start in MB, at its peak and of the results; NaN without CUDA."""
    if device.type != "cuda":
        return float("nan"), float("nan")
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    results = run()  # kept while they are counted
    torch.cuda.synchronize(device)
    kept = torch.cuda.memory_allocated(device)
    del results
    return (torch.cuda.max_memory_allocated(device) - start) / 2**20, (kept - start) / 2**20


def _repeats(run: Callable[[], object], device: torch.device, milliseconds: float) -> int:
    """How often to run per round; this also warms up."""
    _time(run, device, 2)
    return max(1, int(milliseconds / max(_time(run, device, 3), 1e-3)))


def _time(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Mean milliseconds of one run over `repeats` back to back."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) * 1e3 / repeats
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record()
    for _ in range(repeats):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / repeats


def ceilings(device: torch.device) -> dict[str, float]:
    """What this GPU does now: bf16 matrix product in TFLOP/s and copy bandwidth in TB/s (read plus write)."""
    if device.type != "cuda":
        return {}
    left, right = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    block = torch.randn(1 << 29, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(block)
    for run in (lambda: left @ right, lambda: target.copy_(block)):
        _time(run, device, 5)
    product = _time(lambda: left @ right, device, 20)
    copy = _time(lambda: target.copy_(block), device, 20)
    return {"matrix_tflops": 2 * 8192**3 / product * 1e-9, "copy_tbs": 4 * len(block) / copy * 1e-9}


def surroundings(commit: str, device: torch.device) -> dict[str, str]:
    """Hardware, versions and commit of this run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    try:
        triton = importlib.import_module("triton").__version__
    except ImportError:
        triton = "none"
    if not commit:
        answer = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
        commit = answer.stdout.strip() or "unknown"
    return {
        "date": datetime.date.today().isoformat(), "commit": commit, "device": name,
        "torch": torch.__version__, "cuda": torch.version.cuda or "none", "triton": triton,
    }  # fmt: skip
