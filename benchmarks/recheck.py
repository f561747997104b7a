"""What `launch.recheck` costs: processor time and operations of a step that is checked, beside one that is not.

    python benchmarks/recheck.py                       # one process, one thread; a minute

One replica, which computes its first micro-batch a second time. Steps of both kinds alternate; medians. Operations are
those of matrix products, counted by torch. Prints a table; with --out it writes a CSV with versions and commit.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from parallel import opened, write  # noqa: E402

from exlm_dist.config.schema import RunConfig  # noqa: E402


def config_of(micro_batches: int) -> RunConfig:
    """A model of 3 M parameters, whose step takes a fraction of a second."""
    return RunConfig.model_validate(
        {
            "name": "benchmark",
            "data": {"path": "in memory"},
            "model": {"layers": 4, "width": 256, "heads": 4, "ffn": 1024, "max_positions": 256},
            "batch": {"sequences": 16 * micro_batches, "micro": 16},
            "schedule": {"steps": 1000},
            "launch": {"device": "cpu", "threads": 1},
        }
    )


def measured(engine: Any, batches: Any, config: RunConfig, rounds: int) -> dict[str, float]:
    """Ratios, checked to unchecked, of processor time (median over the rounds) and of operations."""
    from torch.utils.flop_counter import FlopCounterMode

    from exlm_dist.training.step import loss_denominator, optimizer_step

    def step(checked: bool) -> None:
        def check(trained: int) -> None:
            again = engine.digest(batches.micro_batches[0], loss_denominator(batches, config), scored=False)
            assert again == trained

        optimizer_step(engine, batches, config, scored=False, check=check if checked else None)

    operations, seconds = [], []
    for checked in (False, True):
        with FlopCounterMode(display=False) as counter:
            step(checked)
        operations.append(counter.get_total_flops())
    for _ in range(rounds):
        pair = []
        for checked in (False, True):
            start = time.process_time()
            step(checked)
            pair.append(time.process_time() - start)
        seconds.append(pair)
    plain, checked_ = (statistics.median(column) for column in zip(*seconds))
    return {"operations": operations[1] / operations[0], "processor_time": checked_ / plain, "step_seconds": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="pairs of steps")
    parser.add_argument("--out", type=Path, help="folder of the CSV")
    options = parser.parse_args()
    import torch

    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    about = {"commit": commit.strip(), "torch": torch.__version__, "processor": platform.machine()}
    rows = []
    config = config_of(4)
    _, loader, engine = opened(config)
    for micro_batches in (1, 4):
        config, batches = config_of(micro_batches), loader.step(0)
        batches.micro_batches[:] = batches.micro_batches[:micro_batches]
        found = measured(engine, batches, config, options.rounds)
        extra = {f"percent_every_{n}": round(100 * (found["processor_time"] - 1) / n, 3) for n in (10, 100, 1000)}
        rows.append(
            {"micro_batches": micro_batches, **{name: round(x, 4) for name, x in found.items()}, **extra, **about}
        )
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()))
    engine.close()
    if options.out:
        write(options.out / f"recheck_{date.today()}.csv", rows)


if __name__ == "__main__":
    main()
