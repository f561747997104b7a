"""A whole training step (forward, backward, AdamW) on a GPU: ExLM compared with the plain masked language model on the
same kernels, and with ExLM written the obvious way (straightforward.py).

    python benchmarks/step.py                          # base shape, blocks of 128 tokens
    python benchmarks/step.py --shape base --length 512 --profile 25

The losses of both ExLMs must agree in fp32 at toy size before anything is timed. Then all sides take turns in one
process; figures are the median and the quartiles over the rounds. A table is printed, and rows with hardware, versions
and commit are added to a CSV. `--shape toy` runs anywhere, for the test: its times mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import gc
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402
from step_sides import (  # noqa: E402
    SHAPES,
    Ours,
    PaddedBatch,
    Shape,
    Straightforward,
    check_equal,
    ideal_flops,
    make_batch,
    model_config,
    needed_flops,
)
from timing import surroundings  # noqa: E402

from exlm_dist.model.stream import Stream  # noqa: E402

TOLERANCE = 1e-4
DROPOUT = 0.1
MATRIX = 8192
BATCHES = 3
COLUMNS = ("date", "commit", "device", "torch", "cuda", "triton", "shape", "length", "sequences", "quantity", "unit",
           "median", "low", "high", "least", "aim")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One figure: median and quartiles over the rounds, and its targets, if any."""

    quantity: str
    unit: str
    median: float
    low: float = math.nan
    high: float = math.nan
    least: float | None = None
    aim: float | None = None


@dataclass
class Side:
    """One side: `step(batch)` is timed over `batches` in turn; `resident` bytes stay allocated between its steps."""

    name: str
    step: Callable[[object], torch.Tensor]
    batches: list[object]
    times: list[float] = field(default_factory=list)  # ms of a step, one per round
    resident: int = 0

    def run(self, steps: int) -> None:
        """`steps` steps, on the batches in turn."""
        for number in range(steps):
            self.step(self.batches[number % len(self.batches)])


def spread(quantity: str, unit: str, values: list[float], least: float | None = None, aim: float | None = None) -> Row:
    """Median and quartiles of one value per round."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return Row(quantity, unit, statistics.median(values), low, high, least, aim)


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of `run`: by events on a GPU that was idle before, by the clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def memory(device: torch.device) -> int:
    """Bytes allocated now (0 without CUDA)."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def roomy(device: torch.device) -> bool:
    """Whether half of a micro-batch of the baseline fits beside the other sides: some 50 GB (see the lab log)."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory > 120e9


def build_sides(shape: Shape, length: int, device: torch.device) -> dict[str, Side]:
    """exlm and mlm at the full micro-batch; exlm-small and straightforward at the one that fits the latter."""
    sequences = max(2, shape.tokens // length)
    few = max(1, sequences // (2 if roomy(device) else 4))
    exlm, mlm = (model_config(shape, objective, DROPOUT) for objective in ("exlm", "mlm"))

    def ours(config) -> Callable[[object], torch.Tensor]:
        side = Ours(config, shape, device, capturable=device.type == "cuda")
        return side.step

    def batches(config, count: int) -> list:
        return [make_batch(config, shape, length, count, seed) for seed in range(BATCHES)]

    sides = {}
    makers = {
        "exlm": (lambda: ours(exlm), lambda: batches(exlm, sequences)),
        "mlm": (lambda: ours(mlm), lambda: batches(mlm, sequences)),
        "exlm-small": (lambda: sides["exlm"].step, lambda: batches(exlm, few)),
        "straightforward": (
            lambda: Straightforward(exlm, shape, device).step,
            lambda: [PaddedBatch.from_packed(batch).to(device) for batch in batches(exlm, few)],
        ),
    }
    for name, (make, draw) in makers.items():
        before = memory(device)
        sides[name] = Side(name, make(), draw())
        sides[name].run(BATCHES)  # compiles, and makes the optimizer's state
        gc.collect()
        sides[name].resident = memory(device) - before
        print(f"{name}: warm", flush=True)
    sides["exlm-small"].resident = sides["exlm"].resident
    return sides


def time_sides(sides: dict[str, Side], device: torch.device, rounds: int, steps: int) -> list[float]:
    """Fill the sides' times, in turn, and return the TFLOP/s of a large matrix product in every round."""
    size, dtype = (MATRIX, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    matrix = []
    for number in range(rounds):
        order = list(sides.values())
        for side in order if number % 2 else order[::-1]:
            side.run(1)
            side.times.append(milliseconds(lambda: side.run(steps), device) / steps)  # noqa: B023 (called at once)
        left @ right
        matrix.append(10 * 2 * size**3 / milliseconds(lambda: [left @ right for _ in range(10)], device) * 1e-9)
    return matrix


def peak_mib(side: Side, device: torch.device) -> float:
    """Largest allocation during a step, without what the other sides have allocated."""
    if device.type != "cuda":
        return math.nan
    gc.collect()
    torch.cuda.synchronize(device)
    start = memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    side.run(1)
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - start + side.resident) / 2**20


def synchronisations(side: Side, device: torch.device) -> list[str]:
    """Where a step waits for the GPU, as torch reports it."""
    if device.type != "cuda":
        return []
    torch.set_warn_always(True)
    torch.cuda.synchronize(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        side.run(1)
        torch.cuda.set_sync_debug_mode("default")
    torch.set_warn_always(False)
    return [f"{item.filename}:{item.lineno}" for item in caught if "called a synchronizing" in str(item.message)]


def host_ms(side: Side, device: torch.device) -> float:
    """Time until a step's work is queued, the GPU idle before (an upper bound when queues fill)."""
    times = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        side.run(1)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def replay_ms(side: Side, device: torch.device, rounds: int) -> tuple[list[float], list[float]]:
    """(ms of a step, ms of a replay of its CUDA graph), in turn, both from a batch that is on the device.

    The kernels read the dropout seed from the batch, so each replay draws masks of its own, as training would.
    """
    ours: Ours = side.step.__self__
    stream = Stream.from_batch(side.batches[0], device, dropout_seed=1)
    gc.collect()  # an autograd graph that is still alive ties its parameters to another stream
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(2):
            ours.step_on(stream)
    torch.cuda.current_stream(device).wait_stream(aside)
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = ours.step_on(stream)
    first = float(ours.step_on(stream))
    graph.replay()
    if not abs(float(loss) - first) < 0.1 * abs(first):
        raise RuntimeError(f"the replayed step has loss {float(loss)}, the step before it {first}")
    eager, replayed = [], []

    def replay() -> None:
        stream.dropout_seed.add_(1)
        graph.replay()

    for _ in range(rounds):
        eager.append(milliseconds(lambda: [ours.step_on(stream) for _ in range(3)], device) / 3)
        replayed.append(milliseconds(lambda: [replay() for _ in range(3)], device) / 3)
    return eager, replayed


def profile(side: Side, device: torch.device, rows: int) -> str:
    """The `rows` GPU kernels that take most time in a step, and the copies and waits of the host."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as measured:
        side.run(1)
        torch.cuda.synchronize(device)
    found: dict[str, list[float]] = {}
    waits: dict[str, int] = {}
    for event in measured.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            if not event.is_user_annotation:
                found.setdefault(event.name, []).append(event.device_time / 1e3)
        elif event.name.startswith("cuda") and ("ynchronize" in event.name or "Memcpy" in event.name):
            waits[event.name] = waits.get(event.name, 0) + 1
    ordered = sorted(found.items(), key=lambda item: -sum(item[1]))
    total = sum(map(sum, found.values()))
    lines = [f"{side.name}: {total:.1f} ms in {sum(map(len, found.values()))} kernels; {waits}"]
    lines += [f"{sum(t):8.2f} ms {len(t):5} x  {name[:110]}" for name, t in ordered[:rows]]
    return "\n".join(lines)


def figures(sides: dict[str, Side], matrix: list[float], shape: Shape, length: int, device: torch.device) -> list[Row]:
    """Everything but the CUDA graph."""
    exlm, mlm, small, other = (sides[name] for name in ("exlm", "mlm", "exlm-small", "straightforward"))
    configs = {"exlm": model_config(shape, "exlm", DROPOUT), "mlm": model_config(shape, "mlm", DROPOUT)}
    rows = [spread(f"{side.name} step", "ms", side.times) for side in sides.values()]
    rows.append(spread("exlm step / mlm step", "", ratios(exlm, mlm), 1.80, 1.70))
    for name, count in (("ideal", ideal_flops), ("needed", needed_flops)):
        flops = {n: count(configs[n], shape, length, sides[n].batches[0]) for n in configs}
        rows.append(Row(f"exlm / mlm operations ({name} count)", "", flops["exlm"] / flops["mlm"]))
        for n in configs:
            asked = (0.40, 0.60 if shape.layers > 12 else 0.55) if (n, name) == ("exlm", "ideal") else (None, None)
            fractions = [flops[n] / ms * 1e-9 / peak for ms, peak in zip(sides[n].times, matrix)]
            rows.append(spread(f"{n} fraction of the matrix peak ({name} count)", "", fractions, *asked))
    rows.append(spread(f"bf16 matrix product {MATRIX}^3", "TFLOP/s", matrix))
    for side in (exlm, small):
        tokens = length * side.batches[0].num_sequences
        rows.append(spread(f"{side.name} original tokens", "1/s", [tokens / ms * 1e3 for ms in side.times]))
    smaller = small.batches[0].num_sequences / exlm.batches[0].num_sequences
    rows.append(spread("speed over straightforward, same batch", "x", ratios(other, small), 4.0, 10.0))
    rows.append(spread("speed over straightforward, own batch", "x", [r / smaller for r in ratios(other, exlm)]))
    peaks = {side.name: peak_mib(side, device) for side in sides.values()}
    rows += [Row(f"{name} peak memory", "MiB", value) for name, value in peaks.items()]
    ratio = peaks[small.name] / peaks[other.name]
    rows.append(Row("peak memory over straightforward", "", ratio, least=0.30, aim=0.15))
    waits = synchronisations(exlm, device)
    print("host waits:", waits or "none")
    rows.append(Row("host synchronisations in a step", "", len(waits), least=0, aim=0))
    return rows + [Row(f"{side.name} host time", "ms", host_ms(side, device)) for side in (exlm, small)]


def ratios(above: Side, below: Side) -> list[float]:
    """above / below in each round."""
    return [a / b for a, b in zip(above.times, below.times)]


def graph_rows(side: Side, device: torch.device, rounds: int) -> list[Row]:
    """What a CUDA graph of the step gains; a step that cannot be captured is reported."""
    if device.type != "cuda":
        return []
    try:
        eager, replayed = replay_ms(side, device, rounds)
    except RuntimeError as error:
        print(f"{side.name}: not captured: {str(error).splitlines()[0]}")
        return [Row(f"{side.name} captured in a CUDA graph", "", 0)]
    gains = [e / r for e, r in zip(eager, replayed)]
    return [spread(f"{side.name} replayed", "ms", replayed), spread(f"{side.name} step / replay", "x", gains)]


def table(rows: list[Row]) -> str:
    """For the screen and for the lab log."""
    lines = ["| what | median | quartiles | at least | aim |", "|---|---|---|---|---|"]
    for row in rows:
        quartiles = "" if math.isnan(row.low) else f"{row.low:.4g} to {row.high:.4g}"
        asked = ["" if value is None else f"{value:g}" for value in (row.least, row.aim)]
        lines.append(f"| {row.quantity} | {row.median:.4g} {row.unit} | {quartiles} | {asked[0]} | {asked[1]} |")
    return "\n".join(lines)


def write(path: Path, around: dict[str, object], rows: list[Row]) -> None:
    """Add the rows to the CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        for row in rows:
            numbers = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in vars(row).items()}
            writer.writerow(around | numbers)


def main(argv: list[str] | None = None) -> int:
    """Check, measure, report; return 1 if the sides do not agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--length", type=int, default=128, help="tokens of a block, BOS and EOS counted")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of a side in a round")
    parser.add_argument("--profile", type=int, default=0, help="also list this many GPU kernels of a step")
    parser.add_argument("--commit", default="", help="of the code, where there is no git folder")
    parser.add_argument("--out", type=Path, help="CSV to add to (default: results/step_<date>.csv)")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and options.shape != "toy":
        parser.error("no CUDA device here; `--shape toy` runs without one")
    difference = check_equal(device)
    print(f"losses agree to {difference:.1e} in fp32 at toy size")
    if not difference < TOLERANCE:
        return 1
    shape = SHAPES[options.shape]
    length = shape.length or options.length
    sides = build_sides(shape, length, device)
    matrix = time_sides(sides, device, options.rounds, options.steps)
    rows = figures(sides, matrix, shape, length, device)
    around = surroundings(options.commit, device)
    around |= {"shape": options.shape, "length": length, "sequences": sides["exlm"].batches[0].num_sequences}
    path = options.out or HERE / "results" / f"step_{around['date']}.csv"
    if options.profile and device.type == "cuda":
        for name in ("exlm", "mlm"):
            print(profile(sides[name], device, options.profile), flush=True)
    print(table(rows), flush=True)
    last = [row for name in ("exlm-small", "exlm") for row in graph_rows(sides[name], device, options.rounds)]
    print(table(last))
    write(path, around, rows + last)
    print(", ".join(f"{name} {value}" for name, value in around.items()), path, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
