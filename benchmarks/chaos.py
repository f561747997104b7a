"""Kills ranks of real runs at random moments, restarts on random numbers of ranks, and compares with undisturbed runs.

    python benchmarks/chaos.py --trials 20                 # a few seconds each
    python benchmarks/chaos.py --trials 1 --seed 17        # trial 17 again

A trial trains a tiny ExLM to its end. Up to three times a random rank gets SIGKILL or SIGSTOP at a random moment,
weighted towards the start, loading a checkpoint, a step and a save; then all ranks are restarted, in half of the trials
on the same number of ranks, in the others on 1, 2 or 4. Every trial must complete by itself, train on the samples of
the undisturbed run in each step, and reproduce its losses: to the last bit on one number of ranks, parameters and
moments included, else within ROUNDING. Trials of odd seeds read damaged shards (flipped bytes in records and in a
header of the tar, a run of zeros), whose records must be replaced alike by all ranks of all launches, and listed.
Nothing may be left behind. The plan of a trial is a function of its seed; when exactly a signal arrives is not.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import multiprocessing.util
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np  # noqa: E402
from chaos_ranks import Kill, launch  # noqa: E402

from exlm_dist.checkpoint import reader  # noqa: E402
from exlm_dist.config import RunConfig  # noqa: E402
from exlm_dist.data.shards import ShardDataset  # noqa: E402
from exlm_dist.prepare.demo.demo_molecules import prepare_demo_smiles  # noqa: E402
from exlm_dist.tracking import read_events  # noqa: E402
from exlm_dist.utils.errors import EXIT_RETRY  # noqa: E402

STEPS, EVERY = 10, 3
WORLDS = (1, 2, 4)
#: Weight of each moment, and the seconds within which the signal then comes.
MOMENTS = {"start": (2, 1.5), "load": (2, 0.3), "step": (3, 0.06), "save": (3, 0.25)}
#: Largest relative difference of a loss, and largest difference of a parameter, after a change of the number of ranks.
ROUNDING = {"loss": 1e-5, "parameter": 1e-3}
#: Launches that a trial may take beyond its kills: a watchdog that ends a job on a slow machine costs one.
SPARE = 4


@dataclass
class Outcome:
    """What a trial did, and what was wrong with it."""

    seed: int
    worlds: list[int] = field(default_factory=list)
    kills: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    bitwise: bool = False
    damaged: bool = False


def damaged_copy(folder: Path, copy: Path) -> set[int]:
    """A copy of the data with damage in its training shards; the damaged records."""
    shutil.copytree(folder, copy)
    data = ShardDataset.open(copy, "train")
    for sample in range(0, len(data), 7):
        shard, record = data.record(sample)
        overwrite(Path(data.place(shard)), int(record["offset"]) + 1, b"\xff")
    shard, record = data.record(len(data) // 2)
    overwrite(Path(data.place(shard)), int(record["offset"]), bytes(300))
    overwrite(Path(data.place(shard)), 0, b"\xff")  # a header: no reader of records meets it
    data.close()
    check = ShardDataset.open(copy, "train", max_bad_records=1.0)
    check.read(np.arange(len(check)))
    return {record.sample for record in check.bad_records}


def overwrite(path: Path, offset: int, content: bytes) -> None:
    """Replace the bytes from `offset` on."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def configuration(runs: Path, name: str, data: Path) -> RunConfig:
    """A run of ten steps with dropout and clipping on, saved every three."""
    return RunConfig.model_validate(
        {
            "name": name,
            "runs": str(runs),
            "data": {"path": str(data), "max_bad_records": 1.0},
            "model": {"layers": 1, "width": 16, "heads": 2, "ffn": 32, "states": 2, "max_positions": 512},
            "batch": {"sequences": 8, "micro": 2},
            "schedule": {"steps": STEPS, "warmup": 2},
            "optimizer": {"lr": 1e-2, "clip": 1.0},
            "checkpoint": {"every": EVERY},
            "evaluation": {"every": 5, "sequences": 8},
            "tracking": {"mlflow": False, "system": False, "every": 1},
            "launch": {"device": "cpu", "threads": 1, "timeout": 60},
            "watchdog": {"start": 8, "step": 3, "save": 3, "evaluation": 3, "end": 6},
        }
    )


class Undisturbed:
    """Undisturbed runs on `data`, one for each number of ranks, made on first use. `bad`: its damaged records."""

    def __init__(self, scratch: Path, data: Path, bad: set[int]) -> None:
        self._scratch, self.data, self.bad = scratch, data, bad
        self._made: dict[int, Facts] = {}

    def of(self, world: int) -> Facts:
        """Facts of the run on `world` ranks."""
        if world not in self._made:
            folder = self._scratch / f"undisturbed-{self.data.name}-{world}"
            folder.mkdir()
            config = configuration(folder, "run", self.data)
            ended = launch(config, world, folder, None)
            assert ended.codes == [0] * world, f"an undisturbed run ended with {ended.codes}: {folder / 'log'}"
            self._made[world] = Facts.read(config, folder)
        return self._made[world]


@dataclass
class Facts:
    """What a finished run leaves."""

    digest: str  # of parameters and moments
    parameters: dict
    losses: dict[int, float]
    samples: dict[int, set[int]]  # of each step that all ranks have finished
    partial: list[tuple[int, set[int]]]  # (step, ids) of each rank, of the other steps

    @staticmethod
    def read(config: RunConfig, folder: Path) -> Facts:
        """From the run folder and the records of its ranks; CheckpointError if the last checkpoint is incomplete."""
        run = Path(config.runs) / config.name
        checkpoint = reader.newest_checkpoint(run)
        assert reader.step_of(checkpoint) == STEPS, f"the newest checkpoint is {checkpoint}"
        parameters, moments = reader.load_weights(checkpoint), reader.load_optimizer(checkpoint)
        digest = hashlib.sha256()
        for tensors in (parameters, moments):
            for name in sorted(tensors):
                digest.update(name.encode() + tensors[name].numpy().tobytes())
        losses: dict[int, float] = {}
        for event in read_events(run / "events.jsonl"):
            if event["kind"] == "metrics" and "train/loss" in event["values"]:
                assert event["step"] not in losses, f"step {event['step']} is in events.jsonl twice"
                losses[event["step"]] = event["values"]["train/loss"]
        samples, partial = _samples(folder)
        return Facts(digest.hexdigest(), parameters, losses, samples, partial)


def _samples(folder: Path) -> tuple[dict[int, set[int]], list[tuple[int, set[int]]]]:
    parts: dict[tuple[str, int], list[list[int]]] = {}
    worlds: dict[tuple[str, int], int] = {}
    for path in folder.glob("samples-*"):
        for line in path.read_text().splitlines():
            step, world, *ids = (int(word) for word in line.split())
            key = (path.name.split("-")[1], step)
            parts.setdefault(key, []).append(ids)
            worlds[key] = world
    whole: dict[int, set[int]] = {}
    partial = []
    for (number, step), ranks in sorted(parts.items()):
        seen = [sample for ids in ranks for sample in ids]
        assert len(seen) == len(set(seen)), f"launch {number}, step {step}: two ranks had the same sample"
        if len(ranks) == worlds[number, step]:
            former = whole.setdefault(step, set(seen))
            assert former == set(seen), f"step {step} had other samples in launch {number}"
        else:
            partial += [(step, set(ids)) for ids in ranks]
    return whole, partial


def plan(rng: random.Random, world: int, step: int) -> Kill:
    """The next kill, for a launch on `world` ranks that continues after `step`."""
    moments = {name: weight for name, (weight, _) in MOMENTS.items() if name != "load" or step > 0}
    phase = rng.choices(list(moments), list(moments.values()))[0]
    left = STEPS - step
    counts = {"start": 1, "load": 1, "step": max(1, left), "save": max(1, left // EVERY)}
    return Kill(
        victim=rng.randrange(world),
        phase=phase,
        count=rng.randint(1, counts[phase]),
        delay=rng.uniform(0, MOMENTS[phase][1]),
        number=rng.choice([signal.SIGKILL] * 3 + [signal.SIGSTOP]),
    )


def trial(seed: int, scratch: Path, undisturbed: Undisturbed) -> Outcome:
    """One run, killed and restarted until it is finished, and compared."""
    rng = random.Random(seed)
    outcome = Outcome(seed, damaged=bool(undisturbed.bad))
    begun = time.monotonic()
    folder = scratch / f"trial-{seed}"
    folder.mkdir()
    config = configuration(folder, "run", undisturbed.data)
    wanted, fixed = rng.choice([1, 1, 2, 3]), rng.random() < 0.5
    world = rng.choice(WORLDS)
    while True:
        outcome.worlds.append(world)
        step = max((reader.step_of(path) for path in reader.checkpoint_folders(folder / "run")), default=0)
        kill = plan(rng, world, step) if len(outcome.kills) < wanted else None
        ended = launch(config, world, folder, kill)
        if ended.killed:
            outcome.kills.append(str(kill))
        if ended.stuck:
            outcome.problems.append(f"ranks {ended.stuck} did not end by themselves after {outcome.kills[-1:]}")
        if ended.codes == [0] * world:
            break
        strange = [code for code in ended.codes if code not in (0, EXIT_RETRY, -signal.SIGKILL)]
        if strange or len(outcome.worlds) > wanted + SPARE:
            outcome.problems.append(f"exit codes {ended.codes} in launch {len(outcome.worlds)}: see {folder / 'log'}")
            break
        world = world if fixed else rng.choice(WORLDS)
    if not outcome.problems:
        outcome.problems = compare(config, folder, outcome, undisturbed)
        outcome.problems += listed_wrongly(folder / "run", undisturbed.bad)
    outcome.problems += leftovers(folder)
    outcome.seconds = time.monotonic() - begun
    return outcome


def compare(config: RunConfig, folder: Path, outcome: Outcome, undisturbed: Undisturbed) -> list[str]:
    """What differs from the undisturbed run."""
    try:
        facts = Facts.read(config, folder)
    except (AssertionError, ValueError) as error:
        return [str(error)]
    reference = undisturbed.of(outcome.worlds[-1])
    problems = []
    wrong = [step for step, ids in facts.samples.items() if ids != reference.samples[step]]
    wrong += [step for step, ids in facts.partial if not ids <= reference.samples[step]]
    if wrong:
        problems.append(f"other samples in steps {sorted(set(wrong))}")
    if missing := sorted(set(reference.samples) - set(facts.samples) - {step for step, _ in facts.partial}):
        problems.append(f"no rank has recorded steps {missing}")
    if facts.losses.keys() != reference.losses.keys():
        problems.append(f"losses of steps {sorted(facts.losses)} in place of {sorted(reference.losses)}")
        return problems
    outcome.bitwise = len(set(outcome.worlds)) == 1
    if outcome.bitwise:
        if facts.digest != reference.digest or facts.losses != reference.losses:
            problems.append("parameters, moments or losses are not the same bits")
        return problems
    loss = max(abs(facts.losses[step] / reference.losses[step] - 1) for step in facts.losses)
    parameter = max(float((facts.parameters[name] - value).abs().max()) for name, value in reference.parameters.items())
    if loss > ROUNDING["loss"] or parameter > ROUNDING["parameter"]:
        problems.append(f"losses differ by {loss:.2g} (relative), parameters by {parameter:.2g}")
    return problems


def listed_wrongly(run: Path, bad: set[int]) -> list[str]:
    """What is wrong with the tables of replaced records: those of the damaged records that the run has met."""
    lines = [line for path in run.glob("quarantine/rank-*.tsv") for line in path.read_text().splitlines()[1:]]
    listed = {int(line.split("\t")[2]) for line in lines if line.split("\t")[1] == "train"}
    if not listed <= bad or bool(listed) != bool(bad):
        return [f"replaced records listed: {sorted(listed)}, damaged ones: {sorted(bad)}"]
    return []


def leftovers(folder: Path) -> list[str]:
    """What a trial must not leave behind: half-written checkpoints, temporary files, files of the watchdog."""
    left = [str(path) for path in (folder / "run" / "checkpoints").glob(".*")]
    deadline = time.monotonic() + 5
    temporary = Path(os.environ["TMPDIR"])
    # torch creates an (empty) cache there when it is imported.
    while (
        found := [path for path in temporary.iterdir() if path.name[:13] != "torchinductor"]
    ) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [f"left behind: {path}" for path in [*left, *map(str, found)]]


def main(arguments: list[str] | None = None) -> int:
    """Run the trials and print a line for each; 1 if one was wrong, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first trial; the others follow")
    parser.add_argument("--out", type=Path, help="CSV to which each trial is added when it has ended")
    options = parser.parse_args(arguments)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="exlm-chaos-") as name:
        scratch = Path(name)
        # Temporary files of the ranks go where leftovers can be counted; the fork server keeps its own folder.
        multiprocessing.util.get_temp_dir()
        (scratch / "tmp").mkdir()
        os.environ["TMPDIR"] = str(scratch / "tmp")
        prepare_demo_smiles(out=scratch / "data", count=120, max_length=128, workers=1, overwrite=False)
        bad = damaged_copy(scratch / "data", scratch / "damaged")
        undisturbed = Undisturbed(scratch, scratch / "data", set()), Undisturbed(scratch, scratch / "damaged", bad)
        for seed in range(options.seed, options.seed + options.trials):
            outcomes.append(trial(seed, scratch, undisturbed[seed % 2]))
            print(line(outcomes[-1]), flush=True)
            if options.out:
                append(options.out, outcomes[-1])
    good = sum(not outcome.problems for outcome in outcomes)
    print(summary(outcomes, good))
    return int(good < len(outcomes))


def line(outcome: Outcome) -> str:
    """One trial in one line."""
    kind = ("bitwise" if outcome.bitwise else "rounding") + (", damaged shards" if outcome.damaged else "")
    verdict = "; ".join(outcome.problems) or f"ok ({kind})"
    return (
        f"seed {outcome.seed}  {outcome.seconds:5.1f} s  ranks {outcome.worlds}  {', '.join(outcome.kills)}  {verdict}"
    )


def summary(outcomes: list[Outcome], good: int) -> str:
    """Totals over all trials."""
    kills = sum(len(outcome.kills) for outcome in outcomes)
    stops = sum("SIGSTOP" in kill for outcome in outcomes for kill in outcome.kills)
    bitwise = sum(outcome.bitwise for outcome in outcomes)
    return (
        f"{good} of {len(outcomes)} trials right: {kills} kills ({stops} of them SIGSTOP), "
        f"{sum(len(outcome.worlds) for outcome in outcomes)} launches, {bitwise} trials to the last bit, "
        f"{len(outcomes) - bitwise} within rounding, {sum(outcome.damaged for outcome in outcomes)} on damaged shards; "
        f"{sum(outcome.seconds for outcome in outcomes):.0f} s"
    )


def append(path: Path, outcome: Outcome) -> None:
    """Add a row with what it takes to run the trial again."""
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    row = {
        "seed": outcome.seed,
        "right": "no: " + "; ".join(outcome.problems) if outcome.problems else "yes",
        "comparison": "bits" if outcome.bitwise else "rounding",
        "shards": "damaged" if outcome.damaged else "whole",
        "ranks": " ".join(map(str, outcome.worlds)),
        "kills": "; ".join(outcome.kills),
        "seconds": f"{outcome.seconds:.1f}",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} {os.cpu_count()} cores",
        "commit": commit.stdout.strip(),
    }
    with open(path, "a", newline="") as file:
        rows = csv.DictWriter(file, list(row))
        if not file.tell():
            rows.writeheader()
        rows.writerow(row)


if __name__ == "__main__":
    sys.exit(main())
