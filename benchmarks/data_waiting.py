"""How long training waits for data on slow storage: the real loader with read-ahead, and a consumer that takes time.

    python benchmarks/data_waiting.py --prepared data/zinc --indexed data/zinc-index

Every opening of a shard takes `--open-ms` and every read `--read-ms` longer than it does (a busy Lustre), in worker
processes too. A step is one micro-batch of 128 sequences, in 165 ms by default: what the base model needs for 128
sequences of 128 tokens on an H100. Shorter ones need less: `--step-ms 58` is the same speed for ZINC's. Columns: the
fraction of the time after the first step that was spent waiting, the longest wait, and the wait for the first step
(opening, the first window, start of the workers). Writes a CSV.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from exlm_dist.data import shard_files  # noqa: E402
from exlm_dist.data.loader import Loader  # noqa: E402
from exlm_dist.data.opening import open_dataset  # noqa: E402
from exlm_dist.data.order import Order  # noqa: E402
from exlm_dist.data.recipe import Recipe  # noqa: E402

DELAYS = "EXLM_BENCHMARK_DELAYS"  # milliseconds of an opening and of a read, for worker processes too
SEQUENCES, STATES, BLOCK, WINDOW = 128, 4, 512, 1024


def pretend_slow() -> None:
    """Openings and reads of local shards take as much longer as the environment says."""
    opening, reading = (float(part) / 1000 for part in os.environ[DELAYS].split())

    def slow_open(*arguments: Any) -> int:
        time.sleep(opening)
        return os.open(*arguments)

    def slow_read(*arguments: Any) -> bytes:
        time.sleep(reading)
        return os.pread(*arguments)

    slow = {**vars(os), "open": slow_open, "pread": slow_read}
    shard_files.os = SimpleNamespace(**slow)  # type: ignore[attr-defined]


if DELAYS in os.environ:  # in a worker process, which imports this file
    pretend_slow()


def waiting(folder: Path, windows: bool, args: argparse.Namespace) -> dict[str, str]:
    """One row: `--steps` steps of one rank."""
    block = BLOCK if windows else 0
    begun = time.perf_counter()
    data = open_dataset(folder, "train", block=block, kept_blocks=2 * WINDOW, workers=args.workers)
    recipe = Recipe(
        states=STATES,
        anchors=True,
        ratio=0.15,
        keep=0.0,
        random=0.0,
        vocab_size=data.vocab_size,
        max_positions=(data.lengths.max() + 2) * STATES,
        bucket=1024,
        micro=SEQUENCES,
    )
    order = Order(0, len(data), block, WINDOW)
    loader = Loader(data, recipe, order=order, global_batch=SEQUENCES, rank=0, world=1, prefetch=args.prefetch)
    waits = []
    loader.step(0)
    start = time.perf_counter()
    for step in range(1, args.steps + 1):
        time.sleep(args.step_ms / 1000)
        waits.append(loader.step(step).wait_seconds)
    seconds = time.perf_counter() - start
    loader.close()
    data.close()
    return {
        "data": data.form,
        "order": "windows" if windows else "full",
        "waiting": f"{sum(waits) / seconds:.4f}",
        "longest_ms": f"{1000 * max(waits):.1f}",
        "first_s": f"{start - begun:.2f}",
        "steps": str(args.steps),
        "step_ms": f"{args.step_ms:g}",
        "open_ms": f"{args.open_ms:g}",
        "read_ms": f"{args.read_ms:g}",
        "prefetch": str(args.prefetch),
        "workers": str(args.workers),
        "date": date.today().isoformat(),
    }


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", type=Path, help="folder of `exlm prepare`")
    parser.add_argument("--indexed", type=Path, help="folder of `exlm data index`")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--step-ms", type=float, default=165.0, help="what a step takes without data")
    parser.add_argument("--open-ms", type=float, default=10.0)
    parser.add_argument("--read-ms", type=float, default=2.0)
    parser.add_argument("--prefetch", type=int, default=2, help="steps read ahead (`data.prefetch`)")
    parser.add_argument("--workers", type=int, default=2, help="processes that tokenize (`data.workers`)")
    default = ROOT / "benchmarks" / "results" / f"data_waiting_{date.today().isoformat()}.csv"
    parser.add_argument("--out", type=Path, default=default, help="CSV to add to")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = options(arguments)
    os.environ[DELAYS] = f"{args.open_ms} {args.read_ms}"
    pretend_slow()
    for folder in (args.prepared, args.indexed):
        for windows in (True, False) if folder else ():
            row = waiting(folder, windows, args)
            print(*(f"{name} {value}" for name, value in row.items()), flush=True)
            new = not args.out.exists()
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with open(args.out, "a", newline="") as file:
                writer = csv.DictWriter(file, row)
                if new:
                    writer.writeheader()
                writer.writerow(row)


if __name__ == "__main__":
    main()
