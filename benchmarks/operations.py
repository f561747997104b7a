"""What interruptions cost: restart in place, detection of a hang, goodput under failures; real runs of `exlm pretrain`.

    python benchmarks/operations.py                        # 2 ranks on this machine, about six minutes
    python benchmarks/operations.py --minutes 0 --rounds 1 # without the goodput

- restart: from SIGKILL of a rank until all restarted ranks have done a step (with imports, rendezvous, loading)
- requeue (--requeue, with slurm/testbed up): from `scontrol requeue` until all ranks have done a step
- hang: from SIGSTOP of a rank until the watchdog has killed the job, less the limit
- goodput: a rank is killed every --every seconds; time in steps that were not lost, over wall time. Predicted from
  the restart, the time between checkpoints and their stall, all measured in the same run
- stall: taken from the newest results of benchmarks/checkpoint.py

The run is observed from outside, by the heartbeats of its ranks. With --out it writes a CSV with machine, load and
commit.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from exlm_dist.config import RunConfig, dump_config  # noqa: E402
from exlm_dist.launch.restart import newest_step  # noqa: E402
from exlm_dist.launch.watchdog import Rank, read_ranks  # noqa: E402
from exlm_dist.prepare.demo.demo_molecules import prepare_demo_smiles  # noqa: E402
from exlm_dist.tracking import read_events  # noqa: E402

#: Seconds that anything may take before the benchmark gives up.
PATIENCE = 180.0
HANG_LIMIT = 3
ROW = ("quantity", "value", "unit", "aim", "detail")
#: What others report (docs/operations.md has the sources).
ANCHORS = {
    "restart in place": "in-process restart of nvidia-resiliency-ext about 1.5 s and the user's start; "
    "FlashRecovery 150 s at 4,800 devices",
    "restart by requeue": "Slurm's default alone: 121 s until a requeued job may start",
    "hang found after its limit": "gloo alone: 30 minutes by default",
    "goodput measured": "Llama 3: over 90 %, ByteRobust: 97 %, with failures hours apart",
}


class Run:
    """`exlm pretrain` in its own processes."""

    def __init__(self, scratch: Path, name: str, every: int) -> None:
        self.config = configuration(scratch, name, every)
        file = scratch / f"{name}.yaml"
        file.write_text(dump_config(self.config))
        self.folder = scratch / name
        self._temporary = scratch / "tmp" / name
        self._temporary.mkdir(parents=True)
        environment = {**os.environ, "TMPDIR": str(self._temporary), "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        self.log = scratch / f"{name}.log"
        with self.log.open("w") as log:
            self.command = subprocess.Popen(self.start(file), env=environment, stdout=log, stderr=log)

    def start(self, file: Path) -> list[str]:
        """The command that starts the run of the configuration `file`."""
        return [sys.executable, "-m", "exlm_dist.cli", "pretrain", str(file)]

    def ranks(self) -> list[Rank]:
        """The ranks that are alive, from their heartbeats."""
        return [rank for folder in self._temporary.glob("exlm-watch-*") for rank in read_ranks(folder)]

    def wait(self, what: str, condition: Callable[[], bool]) -> float:
        """Wait for `condition`; the monotonic time at which it was met."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline or self.command.poll() is not None:
                raise RuntimeError(
                    f"{what}: not within {PATIENCE:g} s, or the command ended:\n{self.log.read_text()[-2000:]}"
                )
            time.sleep(0.005)
        return time.monotonic()

    def wait_for_steps(self, without: set[int] = frozenset()) -> float:
        """Wait until all ranks, none of them with a pid in `without`, have done a step."""

        def stepping() -> bool:
            ranks = self.ranks()
            fresh = [rank for rank in ranks if rank.pid not in without and not rank.phase.startswith("start")]
            return len(fresh) == self.config.local_processes

        return self.wait("a step of all ranks", stepping)

    def strike(self, number: int) -> tuple[set[int], int]:
        """Send a signal to the last rank; (pids of all ranks, pid of that one)."""
        ranks = self.ranks()
        victim = max(ranks, key=lambda rank: rank.rank).pid
        os.kill(victim, number)
        return {rank.pid for rank in ranks}, victim

    def end(self) -> int:
        """Ask the run to end; its exit code."""
        self.command.send_signal(signal.SIGTERM)
        return self.command.wait(PATIENCE)


class Job(Run):
    """The same as a Slurm job on two nodes; sbatch, scontrol and scancel are those of the environment."""

    def start(self, file: Path) -> list[str]:
        """The command that submits the job and waits for its end."""
        where = ["--partition=cpu", "--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=1", "--time=30"]
        script = str(ROOT / "slurm" / "pretrain.sh")
        return ["sbatch", "--wait", *where, f"--output={file.with_suffix('.job')}", script, str(file)]

    @property
    def number(self) -> str:
        """Id of the job."""
        return self.log.read_text().split()[-1]

    def end(self) -> int:
        """Cancel the job."""
        subprocess.run(["scancel", self.number], check=True, timeout=PATIENCE)
        return self.command.wait(PATIENCE)


def configuration(scratch: Path, name: str, every: int) -> RunConfig:
    """Two ranks, a model of 1.5 M parameters."""
    return RunConfig.model_validate(
        {
            "name": name,
            "runs": str(scratch),
            "data": {"path": str(scratch / "data")},
            "model": {"layers": 4, "width": 128, "heads": 4, "ffn": 512, "max_positions": 512},
            "batch": {"sequences": 8, "micro": 4},
            "schedule": {"steps": 1_000_000, "warmup": 10},
            "checkpoint": {"every": every, "best": False},
            "evaluation": {"every": 0},
            "tracking": {"mlflow": False, "system": False, "every": 5},
            "launch": {"device": "cpu", "threads": 1, "processes": 2, "timeout": 120},
            "watchdog": {"step": HANG_LIMIT},
        }
    )


def restarts(run: Run, rounds: int) -> list[float]:
    """Seconds from SIGKILL to the next step of all ranks."""
    seconds = []
    for _ in range(rounds):
        before = newest_step(run.folder)
        run.wait("the next checkpoint", lambda before=before: newest_step(run.folder) > before)
        begun = time.monotonic()
        pids, _ = run.strike(signal.SIGKILL)
        seconds.append(run.wait_for_steps(without=pids) - begun)
    return seconds


def hangs(run: Run, rounds: int) -> list[float]:
    """Seconds from SIGSTOP to the end of the stopped rank, less the limit."""
    seconds = []
    for _ in range(rounds):
        before = newest_step(run.folder)
        run.wait("the next checkpoint", lambda before=before: newest_step(run.folder) > before)
        begun = time.monotonic()
        pids, victim = run.strike(signal.SIGSTOP)
        gone = run.wait("the watchdog", lambda victim=victim: victim not in {rank.pid for rank in run.ranks()})
        seconds.append(gone - begun - HANG_LIMIT)
        run.wait_for_steps(without=pids)
    return seconds


def requeues(job: Job, rounds: int) -> list[float]:
    """Seconds from `scontrol requeue` to the next step of all ranks; the state is saved within them."""
    seconds = []
    for _ in range(rounds):
        before = newest_step(job.folder)
        job.wait("the next checkpoint", lambda before=before: newest_step(job.folder) > before)
        pids = {rank.pid for rank in job.ranks()}
        begun = time.monotonic()
        subprocess.run(["scontrol", "requeue", job.number], check=True, timeout=PATIENCE)
        seconds.append(job.wait_for_steps(without=pids) - begun)
    return seconds


def goodput(scratch: Path, minutes: float, every: float, checkpoint_every: int) -> list[dict[str, str]]:
    """Kill a rank every `every` seconds for `minutes`; predicted and measured fraction of useful time."""
    run = Run(scratch, "goodput", checkpoint_every)
    try:
        begun = run.wait_for_steps()
        down = []
        for number in range(1, int(60 * minutes / every) + 1):
            time.sleep(max(0.0, begun + number * every - time.monotonic()))
            pids, _ = run.strike(signal.SIGKILL)
            struck = time.monotonic()
            down.append(run.wait_for_steps(without=pids) - struck)
        time.sleep(max(0.0, begun + (len(down) + 1) * every - time.monotonic()))
        wall = time.monotonic() - begun
    finally:
        code = run.end()
    assert code == 75, f"the run ended with {code}"
    events = list(read_events(run.folder / "events.jsonl"))
    useful = _last(events, "progress/seconds")
    step = useful / _last(events, "step")
    saves = [event["values"] for event in events if "checkpoint/seconds" in event.get("values", {})]
    stall, written = (statistics.mean(save[f"checkpoint/{name}seconds"] for save in saves) for name in ("stall_", ""))
    restart = statistics.mean(down)
    interval = checkpoint_every * step
    # A failure loses half an interval on average, and what was done while the last checkpoint was being written.
    up = every - restart
    predicted = (up * interval / (interval + stall) - (interval / 2 + written)) / every
    predicted = (len(down) * predicted + interval / (interval + stall)) / (len(down) + 1)  # the last stretch is not hit
    measured = useful / wall
    detail = (
        f"{len(down)} failures {every:g} s apart, restart {restart:.1f} s, checkpoint every {interval:.1f} s, "
        f"written in {written:.2f} s, stall {1000 * stall:.0f} ms"
    )
    return [
        row("goodput predicted", 100 * predicted, "%", "at least 90", detail),
        row("goodput measured", 100 * measured, "%", "within 5 of the prediction", detail),
    ]


def _last(events: list[dict], name: str) -> float:
    if name == "step":
        return max(event["step"] for event in events if "progress/seconds" in event.get("values", {}))
    return [event["values"][name] for event in events if name in event.get("values", {})][-1]


def stall_of_a_save() -> dict[str, str]:
    """Stall of an asynchronous save relative to a synchronous one, from the newest results of checkpoint.py."""
    newest = max((ROOT / "benchmarks" / "results").glob("checkpoint_*.csv"))
    sides = {found["side"]: found for found in csv.DictReader(newest.open())}
    percent = 100 * float(sides["beside"]["over_pieces"])
    return row(
        "stall per save",
        percent,
        "% of a synchronous save",
        "under 5",
        f"{sides['beside']['stall_s']} s; {newest.name}",
    )


def row(quantity: str, value: float, unit: str, aim: str, detail: str) -> dict[str, str]:
    return {"quantity": quantity, "value": f"{value:.2f}", "unit": unit, "aim": aim, "detail": detail}


def spread(values: list[float]) -> str:
    return f"median of {len(values)}, {min(values):.2f} to {max(values):.2f}"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="restarts and hangs")
    parser.add_argument("--minutes", type=float, default=4.0, help="of the run under failures; 0: none")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between failures")
    parser.add_argument("--requeue", action="store_true", help="also by requeue; in an environment of slurm/testbed")
    parser.add_argument("--out", type=Path, help="CSV to write")
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory(prefix="exlm-operations-") as name:
        scratch = Path(name)
        prepare_demo_smiles(out=scratch / "data", count=2000, workers=2)
        if list((ROOT / "benchmarks" / "results").glob("checkpoint_*.csv")):
            rows.append(stall_of_a_save())
        run = Run(scratch, "restarts", 20)
        try:
            run.wait_for_steps()
            found = restarts(run, options.rounds)
            rows.append(row("restart in place", statistics.median(found), "s", "under 15", spread(found)))
            found = hangs(run, options.rounds)
            rows.append(row("hang found after its limit", statistics.median(found), "s", "under 5", spread(found)))
        finally:
            run.end()
        if options.requeue:
            job = Job(scratch, "requeues", 20)
            try:
                job.wait_for_steps()
                found = requeues(job, options.rounds)
                detail = f"{spread(found)}; cred_expire=5"
                rows.append(row("restart by requeue", statistics.median(found), "s", "under 30", detail))
            finally:
                job.end()
        if options.minutes:
            rows += goodput(scratch, options.minutes, options.every, 20)
    for found in rows:
        anchor = ANCHORS.get(found["quantity"], "")
        print(f"{found['quantity']:28}{found['value']:>8} {found['unit']:26}aim: {found['aim']:28}{found['detail']}")
        if anchor:
            print(f"{'':28}others: {anchor}")
    if options.out:
        write(options.out, rows)
    return 0


def write(path: Path, rows: list[dict[str, str]]) -> None:
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    about = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} {os.cpu_count()} cores",
        "load": json.dumps([round(load, 1) for load in os.getloadavg()]),
        "commit": commit.stdout.strip(),
    }
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, [*ROW, *about])
        table.writeheader()
        table.writerows({**found, **about} for found in rows)


if __name__ == "__main__":
    sys.exit(main())
