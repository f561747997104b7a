"""How well do masked tokens come out of ExLM with and without a prior over jumps, beside the plain model?

    python benchmarks/alignment.py --data data/zinc     # the size of the demonstration, on two cores
    python benchmarks/alignment.py --data data/zinc --size small --jobs 9 --arms plain sparse dense-group
    python benchmarks/alignment.py --data data/novels --domain text --out runs/text
    python benchmarks/alignment.py --data data/zinc --masking.ratio 0.5 --out runs/half    # any setting, for all arms

Each arm is trained once per seed by `exlm pretrain`, `--jobs` runs at a time, and evaluated on held-out sequences at
several ratios of masking. The arm `plain-long` takes as many steps more as ExLM costs more. Curves stay in the runs'
`events.jsonl`; the figures go to `<out>/alignment.csv` and, mean and standard deviation over the seeds, to the screen.
`processor_seconds` is what a run's processes used, evaluations included (with `--jobs 1`; 0 where it was trained
before). Runs that are there are not trained again, but continued.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT)]

from exlm_dist.config import check_length, load_config  # noqa: E402
from exlm_dist.data.manifest import read_manifest  # noqa: E402
from exlm_dist.utils.errors import UserError  # noqa: E402

BASES = {domain: ROOT / f"configs/pretrain/demo_{domain}_exlm.yaml" for domain in ("smiles", "text")}
DENSE = {"model.transitions": "dense"}
PLAIN = {
    "model.objective": "mlm",
    "model.states": 1,
    "model.anchors": False,
    "model.rotary": "1d",
    "model.transitions": "uniform",
}
#: Steps of the plain model in the processor time of a step of ExLM, at the size of the demonstration.
LONGER = 2
ARMS: dict[str, dict[str, object]] = {
    "plain": PLAIN,
    "plain-long": PLAIN,
    "sparse": {"model.transitions": "sparse"},
    "dense": {**DENSE, "model.jump_prior": "none"},
    "dense-gaussian": {**DENSE, "model.jump_prior": "gaussian"},
    "dense-laplace": {**DENSE, "model.jump_prior": "laplace"},
    "dense-group": {**DENSE, "model.jump_prior": "group"},
    "dense-group-wide": {**DENSE, "model.jump_prior": "group", "model.jump_width": 0.25},
    "dense-lanes": {**DENSE, "model.jump_prior": "gaussian", "model.jump_width": 0.4},
}  # fmt: skip
SIZES: dict[str, dict[str, object]] = {
    "demo": {"schedule.steps": 1200, "schedule.warmup": 100, "launch.threads": 1},
    # The model of the first entry on ZINC250k in docs/lab-log.md.
    "small": {"model.layers": 4, "model.width": 256, "model.heads": 8, "model.ffn": 1024, "optimizer.lr": 1e-3,
              "batch.sequences": 256, "batch.micro": 256, "schedule.steps": 5000, "schedule.warmup": 250,
              "precision.dtype": "bf16"},
}  # fmt: skip
METRICS = ("nll", "accuracy", "joint_nll", "coupling", "exact")


def command(arm: str, seed: int, options: argparse.Namespace) -> list[str]:
    """`exlm pretrain` of one run."""
    settings = {
        "name": f"{arm}_{seed}", "seed": seed, "runs": str(options.out / "runs"), "data.path": str(options.data),
        "launch.processes": 1, **SIZES[options.size], **ARMS[arm],
    }  # fmt: skip
    if options.steps:
        settings |= {"schedule.steps": options.steps, "schedule.warmup": max(1, options.steps // 20)}
    steps = int(settings["schedule.steps"]) * (LONGER if arm == "plain-long" else 1)
    settings["schedule.steps"] = steps
    settings |= {
        "checkpoint.every": steps,
        "evaluation.every": max(1, steps // 12),
        "tracking.every": max(1, steps // 60),
    }
    settings |= {"evaluation.sequences": min(1024, options.sequences)}
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "exlm_dist.cli", "pretrain", str(BASES[options.domain]), *flags, *options.settings]


def check_ratios(options: argparse.Namespace) -> None:
    """ConfigError, before anything is trained, if an arm cannot be asked at one of the ratios."""
    longest = read_manifest(options.data)["max_length"]
    for arm in options.arms:
        base, *flags = command(arm, 0, options)[4:]
        model = load_config(Path(base), flags).model
        check_length(
            longest,
            ratio=max(options.ratios),
            states=model.states,
            anchors=model.anchors,
            max_positions=model.max_positions,
        )


def train(arm: str, seed: int, options: argparse.Namespace) -> tuple[float, float]:
    """Train one run, if it is not there, and return the seconds of its steps and its processor seconds."""
    before = processor_seconds()
    log = options.out / f"{arm}_{seed}.log"
    with log.open("a") as file:
        subprocess.run(
            command(arm, seed, options), cwd=ROOT, stdout=file, stderr=file, timeout=options.limit, check=True
        )
    points = [
        json.loads(line) for line in (run_of(arm, seed, options) / "events.jsonl").read_text().splitlines() if line
    ]
    seconds = max(point["values"].get("progress/seconds", 0.0) for point in points if point["kind"] == "metrics")
    return seconds, processor_seconds() - before if options.jobs == 1 else 0.0


def processor_seconds() -> float:
    """Of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_of(arm: str, seed: int, options: argparse.Namespace) -> Path:
    """Folder of a run."""
    return options.out / "runs" / f"{arm}_{seed}"


def rows_of(
    arm: str, seed: int, seconds: tuple[float, float], options: argparse.Namespace
) -> Iterable[dict[str, object]]:
    """A line of the table for each ratio."""
    from exlm_dist.evaluation.masked_lm import evaluate_checkpoint

    for ratio in options.ratios:
        found = evaluate_checkpoint(
            run_of(arm, seed, options),
            sequences=options.sequences,
            complete=min(500, options.sequences),
            mask_ratio=ratio,
            record=False,
        )
        values = {name: found.values[name] for name in METRICS}
        spent = {"seconds": round(seconds[0], 1), "processor_seconds": round(seconds[1], 1)}
        yield {"arm": arm, "seed": seed, "step": found.step, **spent, "ratio": ratio, **values}


def table(rows: list[dict[str, object]], options: argparse.Namespace) -> str:
    """Mean and standard deviation over the seeds."""
    lines = ["| arm | " + " | ".join(f"{name} at {ratio:g}" for ratio in options.ratios for name in METRICS) + " |"]
    lines.append("|---" * (1 + len(options.ratios) * len(METRICS)) + "|")
    for arm in options.arms:
        cells = []
        for ratio in options.ratios:
            mine = [row for row in rows if (row["arm"], row["ratio"]) == (arm, ratio)]
            for name in METRICS:
                values = [float(row[name]) for row in mine]
                spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Train, evaluate, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="prepared folder")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["plain", "sparse", "dense", "dense-group"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--domain", choices=BASES, default="smiles", help="of the data")
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--steps", type=int, default=0, help="instead of those of the size")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.15, 0.3, 0.5])
    parser.add_argument("--sequences", type=int, default=2048, help="held-out sequences")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--limit", type=float, default=36000, help="seconds for one run")
    parser.add_argument("--out", type=Path, default=Path("runs/alignment"))
    options, options.settings = parser.parse_known_args(argv)
    options.data, options.out = options.data.resolve(), options.out.resolve()
    try:
        check_ratios(options)
    except UserError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    cells = [(arm, seed) for seed in options.seeds for arm in options.arms]
    with ThreadPoolExecutor(options.jobs) as pool:
        seconds = list(pool.map(lambda cell: train(*cell, options), cells))
    print(f"trained in {time.monotonic() - started:.0f} s", flush=True)
    rows: list[dict[str, object]] = []
    for (arm, seed), spent in zip(cells, seconds):
        rows += rows_of(arm, seed, spent, options)
        with (options.out / "alignment.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    print(table(rows, options))
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
