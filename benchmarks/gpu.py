"""Everything that needs a GPU, in one command for the day one is at hand: `python benchmarks/gpu.py`, 25 minutes.

    python benchmarks/gpu.py                         # all parts; once more: only those that are missing or failed
    python benchmarks/gpu.py tests kernels-dag       # these parts
    python benchmarks/gpu.py --data data/zinc        # the trainer part on this prepared folder instead of its own
    python benchmarks/gpu.py --toy                   # tiny sizes anywhere; times mean nothing

Parts run one after the other as processes of their own, each with a time limit. What a part writes and prints goes to
`<out>/<part>/`; `<out>/README.md` has card, versions, commit and one table: measured, asked, aim. A part ended by its
limit or by `--limit` is run again by the same command; those that are done are not. Nothing but torch, triton, numpy,
pydantic and pytest is needed, and DeepSpeed for the parts `memory` and `trainer`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LEAST_SECONDS = 15
KERNELS = ("dag", "transitions", "vocab", "elementwise", "attention")
PRINT_SURROUNDINGS = """
import json, torch
from timing import ceilings, surroundings
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
memory = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else float("nan")
print(json.dumps(surroundings({commit!r}, device) | ceilings(device) | {{"memory_gib": memory}}))
"""


@dataclass(frozen=True)
class Row:
    """One line of the table; `asked` and `aim` are empty where nothing was asked."""

    quantity: str
    measured: str
    asked: str = ""
    aim: str = ""


@dataclass
class Workbench:
    """What the parts share: options, the folder of the part that runs, and when it must be done."""

    options: argparse.Namespace
    folder: Path
    deadline: float

    def run(self, *command: str) -> str:
        """Run a command of this project in a process of its own; what it prints goes to `log.txt` and is returned.

        Raises:
            subprocess.TimeoutExpired: past the deadline; the process and its children are gone then.
            subprocess.CalledProcessError: an exit status other than 0.
        """
        path = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        log = self.folder / "log.txt"
        before = log.stat().st_size if log.exists() else 0
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )
            try:
                process.wait(max(1.0, self.deadline - time.monotonic()))
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, 9)
                    process.wait()
        with log.open("rb") as file:
            file.seek(before)
            printed = file.read().decode(errors="replace")
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, printed)
        return printed

    def benchmark(self, script: str, *arguments: str) -> str:
        """Run a script of this folder, at toy size if asked."""
        commit = ["--commit", self.options.commit] if self.options.commit else []
        return self.run(str(HERE / script), *arguments, *commit)


def environment(bench: Workbench) -> list[Row]:
    """The card, what it can do now, and the versions."""
    printed = bench.run("-c", PRINT_SURROUNDINGS.format(commit=bench.options.commit))
    facts = json.loads(printed.splitlines()[-1]) | {"python": platform.python_version()}
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout.strip()
    return [Row(name, f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in facts.items()]


def tests(bench: Workbench) -> list[Row]:
    """The tests that need a GPU."""
    report = bench.folder / "junit.xml"
    # Only files with such tests, so that packages which others import are not needed.
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    chosen = files[:1] if bench.options.toy else files
    try:
        # Two at a time: the largest takes some 25 GB.
        bench.run(
            "-m", "pytest", "-q", "-n", "2", "-m", "gpu", *chosen, f"--junitxml={report}", "-p", "no:cacheprovider"
        )
    except subprocess.CalledProcessError:
        if not report.exists():
            raise
    suite = ElementTree.parse(report).getroot()[0]
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = [case.attrib["name"] for case in suite if any(child.tag in ("failure", "error") for child in case)]
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    rows = [Row("passed, skipped", f"{passed}, {counts['skipped']}")]
    return [*rows, Row("failed", str(len(failed)) + (": " + ", ".join(failed) if failed else ""), "0", "0")]


def kernels(operation: str) -> Callable[[Workbench], list[Row]]:
    """One operation beside other ways to compute it."""

    def part(bench: Workbench) -> list[Row]:
        toy = ["--toy", "--rounds", "1", "--milliseconds", "1"] if bench.options.toy else []
        printed = bench.benchmark("kernels.py", operation, "--out", str(bench.folder), *toy)
        return [row for table in re.split(r"^### ", printed, flags=re.M)[1:] for row in _rows_of_case(table)]

    return part


def _rows_of_case(table: str) -> list[Row]:
    """The time of our side and the best of the others over it, out of a table of `kernels.py`."""
    name = table.splitlines()[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    times = {line[0]: line[1] for line in cells[1:]}
    rows = [
        Row(f"{name}: {side}", value if value.startswith("left out") else f"{value} ms")
        for side, value in times.items()
    ]
    found = re.search(r"Best other side over ours: ([\d.]+) \(at least ([\d.]+), aim ([\d.]+)\)", table)
    if found:
        rows.append(Row(f"{name}: best other side / ours", *found.groups()))
    return rows


def tiles(bench: Workbench) -> list[Row]:
    """Attention by other tiles than those that ship; a smaller ratio than 1 means that other tiles are faster."""
    printed = bench.benchmark("attention_tiles.py", *(["--toy"] if bench.options.toy else []))
    rows = []
    for table in re.split(r"^### ", printed, flags=re.M)[1:]:
        cells = [
            [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")
        ]
        sides = {line[0]: float(line[6]) for line in cells[1:] if not line[1].startswith("left out")}
        best = min(sides, key=lambda side: sides[side])
        rows.append(Row(f"{table.splitlines()[0]}: fastest ({best}) / shipped", f"{sides[best]:.3f}", "", "1"))
    return rows


def step(length: int) -> Callable[[Workbench], list[Row]]:
    """A training step of ExLM, of the plain model and of ExLM written the obvious way; replay of a CUDA graph."""

    def part(bench: Workbench) -> list[Row]:
        table = bench.folder / "step.csv"
        table.unlink(missing_ok=True)
        size = ["--shape", "toy", "--rounds", "2", "--steps", "1"] if bench.options.toy else ["--profile", "30"]
        bench.benchmark("step.py", "--length", str(length), "--out", str(table), *size)
        with table.open(newline="") as file:
            lines = list(csv.DictReader(file))
        return [Row(line["quantity"], f"{line['median']} {line['unit']}", line["least"], line["aim"]) for line in lines]

    return part


def memory(bench: Workbench) -> list[Row]:
    """Peak memory of a step beside the planner's prediction."""
    device = "cpu" if bench.options.toy else "cuda"
    select = ["--select", "states=8"] if bench.options.toy else []
    bench.benchmark("memory.py", "--device", device, "--out", str(bench.folder), *select)
    with max(bench.folder.glob("memory*.csv")).open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [
        Row(f"{line['case']}: predicted / measured", f"{line['ratio']} of {line['measured']} MiB", "0.95 to 1.05")
        for line in lines
    ]


def trainer(bench: Workbench) -> list[Row]:
    """`exlm pretrain` with one rank: speed, held-out nll, and a run resumed half-way against the undisturbed one."""
    options, runs = bench.options, bench.folder / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    data = options.data
    if data is None:
        data = bench.folder / "data"
        if not data.exists():
            bench.run("-m", "exlm_dist.cli", "prepare", "demo-text", "--out", str(data))
    steps = 4 if options.toy else 400
    command = [
        "-m", "exlm_dist.cli", "pretrain", str(ROOT / "configs/pretrain/demo_text_exlm.yaml"), "--name", "gpu",
        "--runs", str(runs), "--data.path", str(data), "--launch.processes", "1", "--schedule.steps", str(steps),
        "--schedule.warmup", str(steps // 4), "--checkpoint.every", str(steps // 2),
        "--evaluation.every", str(steps // 2), "--tracking.every", str(max(1, steps // 20)),
    ]  # fmt: skip
    if not options.toy:
        command += ["--batch.sequences", "256", "--batch.micro", "256", "--precision.dtype", "bf16"]
    bench.run(*command)
    last = runs / "gpu" / "checkpoints" / f"step-{steps:08d}"
    undisturbed, events = _weights(last), _metrics(runs / "gpu" / "events.jsonl")
    shutil.rmtree(last)
    bench.run(*command)
    resumed = _weights(last)
    speed = statistics.median(
        [point["perf/tokens_per_second"] for point in events if "train/loss" in point][5:] or [0.0]
    )
    nll = [point["valid/nll"] for point in events if "valid/nll" in point]
    equal = sum(undisturbed[name] == resumed.get(name) for name in undisturbed)
    return [
        Row("original tokens per second", f"{speed:.0f}"),
        Row("held-out nll half-way, at the end", ", ".join(f"{value:.4f}" for value in nll)),
        Row("files of the resumed run equal to the bit", f"{equal} of {len(undisturbed)}", str(len(undisturbed))),
    ]


def _weights(folder: Path) -> dict[str, bytes]:
    """Contents of the tensors of a checkpoint, by file."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def _metrics(path: Path) -> list[dict[str, float]]:
    """The metrics of an event log."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    return [line["values"] for line in lines if line["kind"] == "metrics"]


@dataclass(frozen=True)
class Part:
    """A part, how many seconds it may take, and what it asks."""

    run: Callable[[Workbench], list[Row]]
    limit: int
    question: str


_STEP = "A training step of ExLM, of the plain model and of ExLM written the obvious way; replay of a CUDA graph."
PARTS = {
    "environment": Part(environment, 90, "The card, what it can do now, and the versions."),
    "tests": Part(tests, 300, "The tests that need a GPU."),
    **{
        f"kernels-{name}": Part(kernels(name), 240, f"{name}: ours beside other ways to compute it.")
        for name in KERNELS
    },
    "step-128": Part(step(128), 180, _STEP),
    "step-512": Part(step(512), 180, _STEP),
    "trainer": Part(
        trainer, 240, "`exlm pretrain`, one rank: speed, held-out nll, a resumed run against an undisturbed one."
    ),
    "memory": Part(memory, 180, "Peak memory of a step beside the planner's prediction."),
    "tiles": Part(tiles, 300, "Attention by other tiles than those that ship; below 1 others are faster."),
}


def run_part(name: str, options: argparse.Namespace, deadline: float) -> dict[str, object]:
    """Run one part; its record: status, seconds and rows."""
    part, started = PARTS[name], time.monotonic()
    bench = Workbench(options, options.out / name, min(deadline, started + part.limit))
    bench.folder.mkdir(parents=True, exist_ok=True)
    (bench.folder / "log.txt").unlink(missing_ok=True)
    status, rows = "done", []
    try:
        rows = part.run(bench)
    except subprocess.TimeoutExpired:
        status = "ended by its time limit; run the same command again"
    except (subprocess.CalledProcessError, OSError, ValueError, KeyError, IndexError) as error:
        status = f"failed, see {name}/log.txt: {type(error).__name__} {str(error).splitlines()[0][:200]}"
    seconds = round(time.monotonic() - started, 1)
    record = {"status": status, "seconds": seconds, "commit": options.commit, "rows": [asdict(row) for row in rows]}
    (bench.folder / "result.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def known(name: str, options: argparse.Namespace) -> dict[str, object] | None:
    """The record of a part that was run before in this folder."""
    path = options.out / name / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def write_report(options: argparse.Namespace) -> str:
    """README.md of the folder: a table for each part that was run."""
    lines = ["# Measured on a GPU" if not options.toy else "# Toy sizes: the times mean nothing", ""]
    for name, part in PARTS.items():
        record = known(name, options)
        if record is None:
            continue
        lines += [f"## {name}", "", part.question, ""]
        lines += [f"{record['status']}, {record['seconds']} s, commit {record['commit'] or '-'}", ""]
        if record["rows"]:
            lines += ["| what | measured | asked | aim |", "|---|---|---|---|"]
            lines += ["| {quantity} | {measured} | {asked} | {aim} |".format(**row) for row in record["rows"]]
            lines.append("")
    text = "\n".join(lines)
    (options.out / "README.md").write_text(text)
    return text


def main(argv: list[str] | None = None) -> int:
    """Run the parts that are missing; 1 if one of those asked for is not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all, in this order")
    parser.add_argument("--out", type=Path, default=HERE / "results" / time.strftime("gpu_%Y-%m-%d"))
    parser.add_argument("--data", type=Path, help="prepared folder for the part `trainer`")
    parser.add_argument("--limit", type=float, default=1500, help="seconds for everything")
    parser.add_argument("--commit", default="", help="of the code, where there is no git folder")
    parser.add_argument("--again", action="store_true", help="also run parts that are done")
    parser.add_argument("--toy", action="store_true", help="tiny sizes; works without a GPU")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"unknown part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    options.out = options.out.resolve()
    options.data = options.data and options.data.resolve()
    deadline = time.monotonic() + options.limit
    asked = options.parts or list(PARTS)
    for name in asked:
        before = known(name, options)
        if before and before["status"] == "done" and not options.again:
            continue
        if deadline - time.monotonic() < LEAST_SECONDS:
            print("out of time; run the same command again", flush=True)
            break
        record = run_part(name, options, deadline)
        print(f"{name}: {record['status']} ({record['seconds']} s)", flush=True)
        write_report(options)
    print(write_report(options))
    print(options.out)
    return int(any((known(name, options) or {"status": ""})["status"] != "done" for name in asked))


if __name__ == "__main__":
    sys.exit(main())
