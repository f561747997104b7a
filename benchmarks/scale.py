"""A thousand ranks on paper: step and goodput of a run on 8 to 4,096 GPUs, by `exlm_dist.planning.scaling`.

    python benchmarks/scale.py                         # seconds; no torch, no GPU

The layout that `exlm plan` recommends for 64 GPUs, with more and fewer replicas. Two ways to use more GPUs: the global
batch grows in proportion, or stays. Failures at two rates, checkpoints as often as configured and as often as is best.
Writes a CSV and a figure; nothing is measured.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from exlm_dist.config import load_config  # noqa: E402
from exlm_dist.planning.hardware import Hardware  # noqa: E402
from exlm_dist.planning.job import Job  # noqa: E402
from exlm_dist.planning.planner import GIB, Request, find_plans, recommended  # noqa: E402
from exlm_dist.planning.scaling import HOUR, SIZES, Cluster, Outlook, outlook, saved_every, scaled  # noqa: E402

CONFIGS = ("exlm_1b_text", "exlm_7b_text")
LENGTH, VOCABULARY, PLANNED = 512, 50_265, 64
#: Hours of a GPU between two failures: Llama 3's, and five times as many failures.
FAILURES = (50_700, 10_000)
PARTS = ("compute", "bandwidth", "latency", "control", "slowest", "reading", "saving")
HARDWARE = Hardware()


def planned(name: str) -> Job:
    """The recommended layout on `PLANNED` GPUs of 80 GiB."""
    config = load_config(ROOT / "configs" / "pretrain" / f"{name}.yaml")
    request = Request(config, VOCABULARY, LENGTH, PLANNED, 80 * GIB, 0.1, HARDWARE)
    return recommended(find_plans(request)).job


def row(name: str, batch: str, found: Outlook, cluster: Cluster) -> dict[str, Any]:
    best = outlook(saved_every(found.job, found.best_every), HARDWARE, cluster)
    parallel = found.job.config.parallel
    return {
        "config": name, "batch": batch, "failure_hours": round(cluster.failure / HOUR), "gpus": found.job.world,
        "tensor": parallel.tensor, "pipeline": parallel.pipeline, "data": parallel.data, "zero": parallel.zero,
        "sequences": found.job.config.batch.sequences, "step": found.path.total,
        **{part: getattr(found.path, part) for part in PARTS},
        "write": found.write, "goodput": found.goodput, "best_every": found.best_every, "best_goodput": best.goodput,
        "tokens_per_second": found.tokens_per_second,
    }  # fmt: skip


def rows_of(name: str) -> list[dict[str, Any]]:
    job, found = planned(name), []
    for hours in FAILURES:
        cluster = Cluster(failure=hours * HOUR)
        for batch in ("in proportion", "fixed"):
            sizes = [scaled(job, size, fixed_batch=batch == "fixed") for size in SIZES]
            found += [row(name, batch, outlook(made, HARDWARE, cluster), cluster) for made in sizes if made is not None]
    return found


def draw(rows: list[dict[str, Any]], folder: Path) -> Path:
    """Parts of a step, tokens per second and GPU, and goodput, over the GPUs; a row of panels for each model."""
    from exlm_dist.analysis import style

    subtitle = (
        "Predicted, not measured: H100 SXM, a 400 Gbit/s port per GPU; left and right: batch in proportion; "
        "assumptions in docs/parallelism.md"
    )
    with style.figure(12, 7.2, "A step and a run on 8 to 4,096 GPUs", subtitle) as made:
        for panels, name in zip(made.subplots(len(CONFIGS), 3, sharex=True), CONFIGS):
            mine = [this for this in rows if this["config"] == name]
            for axes, panel in zip(panels, (parts, efficiency, goodput)):
                panel(axes, mine)
                axes.set_xscale("log", base=2)
                axes.set_xticks(SIZES[::3], [f"{size:,}" for size in SIZES[::3]])
                axes.legend()
            panels[0].set_title(f"{name}: seconds of a step")
            panels[1].set_title("Tokens/s of a GPU, % of 8 GPUs")
            panels[2].set_title("Goodput, %")
            for axes in panels:
                axes.set_xlabel("GPUs")
        made.savefig(folder / "scale.png", dpi=110)
        return folder / "scale.png"


def chosen(rows: list[dict[str, Any]], batch: str, hours: int) -> list[dict[str, Any]]:
    return [this for this in rows if this["batch"] == batch and this["failure_hours"] == hours]


def parts(axes: Any, rows: list[dict[str, Any]]) -> None:
    from exlm_dist.analysis import style

    shown = chosen(rows, "in proportion", FAILURES[0])
    for part, colour in zip(PARTS, style.COLOURS):
        values = [this[part] for this in shown]
        if max(values) > 1e-3:
            axes.plot([this["gpus"] for this in shown], values, color=colour, label=part)
    axes.set_yscale("log")
    axes.set_ylim(1e-3, None)


def efficiency(axes: Any, rows: list[dict[str, Any]]) -> None:
    from exlm_dist.analysis import style

    for batch, colour in zip(("in proportion", "fixed"), style.COLOURS):
        shown = chosen(rows, batch, FAILURES[0])
        per_gpu = [this["tokens_per_second"] / this["gpus"] for this in shown]
        first = per_gpu[0]
        values = [100 * value / first for value in per_gpu]
        axes.plot([this["gpus"] for this in shown], values, color=colour, marker="o", ms=3, label=f"batch {batch}")
    axes.set_ylim(0, 105)


def goodput(axes: Any, rows: list[dict[str, Any]]) -> None:
    from exlm_dist.analysis import style

    for hours, colour in zip(FAILURES, style.COLOURS):
        shown = chosen(rows, "in proportion", hours)
        for column, line, saves in (("goodput", "-", "1,000 steps"), ("best_goodput", ":", "best interval")):
            values = [100 * this[column] for this in shown]
            label = f"a failure in {hours:,} h of a GPU, {saves}"
            axes.plot([this["gpus"] for this in shown], values, color=colour, linestyle=line, label=label)
    axes.set_ylim(None, 100.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the CSV")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "images", help="folder of the figure")
    options = parser.parse_args()
    rows = [found for name in CONFIGS for found in rows_of(name)]
    with (options.out / "scale.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({name: f"{x:.4g}" if isinstance(x, float) else x for name, x in this.items()} for this in rows)
    print(f"written to {options.out / 'scale.csv'} and {draw(rows, options.figure)}")
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main()
