"""`sbatch slurm/pretrain.sh` in a real Slurm: whatever happens to a job, its run ends with the same bits.

Every scenario runs on each number of nodes in `SIZES`. All jobs are submitted at once and run side by side; threads
inject the faults, and each test waits for its own.
"""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from cluster.slurm_testbed import Job, Slowed, Slurm, run_until
from locations import ROOT
from made_run import MOLECULES, make_data
from tracking_server import free_port, mlflow_server

from exlm_dist.checkpoint import reader
from exlm_dist.prepare.demo.demo_molecules import prepare_demo_smiles
from exlm_dist.tracking import sync
from exlm_dist.training.sample_log import samples_of_steps
from exlm_dist.utils.checkpoint_names import newest_step

PRETRAIN = ROOT / "slurm" / "pretrain.sh"
DEMONSTRATION = ROOT / "configs" / "pretrain" / "demo_smiles_exlm.yaml"
SIZES = (2, 4)  # nodes, with a rank on each
pytestmark = pytest.mark.timeout(900)
STEPS, BATCH, SAMPLES = 200, 12, 60
TINY = {
    "data": {"path": "data"},
    "model": {"layers": 1, "width": 16, "heads": 2, "ffn": 32, "states": 2, "max_positions": 128},
    "batch": {"sequences": BATCH, "micro": 3},
    "optimizer": {"lr": 1e-2, "clip": 1.0},
    "schedule": {"steps": STEPS, "warmup": 2},
    "checkpoint": {"every": 10},
    "evaluation": {"every": 100, "sequences": 10},
    "tracking": {"mlflow": False, "system": False, "every": 10, "samples": True},
    "launch": {"timeout": 60, "device": "cpu", "threads": 1},
    "watchdog": {"step": 15, "save": 15, "evaluation": 15},
}
#: Seconds; generous, for a machine under load.
LIMIT = 400.0


@pytest.fixture(scope="module")
def server() -> str:
    """Address of a tracking server that is down."""
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def jobs(slurm: Slurm, scenarios, server: str) -> dict[str, Job]:
    """The jobs of this module, submitted at once. (The short ones of `test_policy` run beside them.)"""
    make_data(slurm.folder / "data")
    (slurm.folder / "tiny.yaml").write_text(yaml.safe_dump({"name": "tiny", **TINY}))
    (slurm.folder / "sweep.txt").write_text("".join(f"--name whole-{nodes}\n" for nodes in SIZES))
    prepare_demo_smiles(
        out=slurm.folder / "data" / "demo_smiles", count=2000, max_length=128, workers=2, overwrite=False
    )
    made = {}
    for line, nodes in enumerate(SIZES, start=1):
        made |= jobs_on(slurm, nodes, line, server)
    return made


def jobs_on(slurm: Slurm, nodes: int, line: int, server: str) -> dict[str, Job]:
    """The jobs on so many nodes: an undisturbed run, one with injected faults, one with little time, and the shipped
    demonstration on fewer molecules and in small batches. The undisturbed run is a task of an array, `line` of the
    sweep file."""

    def submit(*arguments: str, options: list[str], **environment: str) -> Job:
        fixed = ["--gpus-per-node=1", f"--nodes={nodes}", "--time=30", *options]
        return slurm.submit(PRETRAIN, "tiny.yaml", *arguments, options=fixed, EXLM_GRACE="5", **environment)

    tracked = ["--tracking.mlflow", "true"]
    limited = [f"--nodes={nodes}", "--gpus-per-node=1", "--time=1", "--warning=10", f"--name=limited-{nodes}"]
    # While the ranks of all jobs start on two cores, a minute is enough for a step or two: that several such starts in
    # a row end a job is for `test_policy` to show.
    limited += ["--launch.restarts=50"]
    made = {
        "hurt": submit("--name", f"hurt-{nodes}", *tracked, "--tracking.uri", server, options=[]),
        "limited": slurm.launch("tiny.yaml", *limited, "--launch.margin=5", *tracked),
        # Later than the others, which take longest.
        "whole": submit(options=[f"--array={line}", "--begin=now+75"], EXLM_SWEEP="sweep.txt"),
    }
    later = [f"--nodes={nodes}", "--gpus-per-node=1", f"--dependency=afterany:{made['whole'].number}"]
    small = ["--name", f"demo-{nodes}", "--launch.device", "cpu", "--tracking.mlflow", "false"]
    small += ["--batch.sequences", "8", "--batch.micro", str(8 // nodes), "--evaluation.sequences", "16"]
    made["demo"] = slurm.submit(PRETRAIN, str(DEMONSTRATION), *small, options=later)
    Slowed(made["limited"])
    made["whole"].number += f"_{line}"
    return {f"{name}-{nodes}": job for name, job in made.items()}


@pytest.fixture(scope="module")
def whole(slurm: Slurm, jobs: dict[str, Job]) -> dict[int, Path]:
    """By number of nodes: the run folder of the undisturbed job, once it has finished."""
    for nodes in SIZES:
        job = jobs[f"whole-{nodes}"]
        assert job.wait(LIMIT) == "COMPLETED" and job.starts() == 1, job.log()
        assert job.facts()["NumNodes"] == str(nodes)
    return {nodes: slurm.folder / "runs" / f"whole-{nodes}" for nodes in SIZES}


@pytest.fixture(scope="module")
def harm(slurm: Slurm, jobs: dict[str, Job]) -> Iterator[dict[int, Future]]:
    """By number of nodes: the thread that injects the faults, started."""
    with ThreadPoolExecutor(len(SIZES)) as threads:
        yield {nodes: threads.submit(hurt, slurm, jobs[f"hurt-{nodes}"], nodes) for nodes in SIZES}


def hurt(slurm: Slurm, job: Job, nodes: int) -> None:
    """Inject one fault after the other, each once the run has recovered from the one before."""
    run, victim = slurm.folder / "runs" / f"hurt-{nodes}", nodes - 1

    def progress(since: int) -> int:
        run_until(lambda: newest_step(run) > since, job, f"checkpoint after step {since}", LIMIT)
        return newest_step(run)

    step = progress(0)
    job.signal_rank(victim, signal.SIGKILL)
    step = progress(step)
    job.signal_rank(victim, signal.SIGSTOP)
    progress(step)
    assert job.restarts == 0 and job.starts() == 3, job.log()
    for restarts, fault in enumerate(
        (
            lambda: slurm.ask("scancel", "--signal=USR1", job.number),
            lambda: slurm.ask("scontrol", "requeue", job.number),
            lambda: lose_last_node(slurm, job),
        ),
        start=1,
    ):
        fault()
        run_until(lambda number=restarts + 1: f"start {number}:" in job.log(), job, f"start {restarts + 1}", LIMIT)
        progress(newest_step(run))
    assert job.wait(LIMIT) == "COMPLETED", job.log()


@pytest.fixture(scope="module")
def served(slurm: Slurm, server: str, harm: dict[int, Future]) -> Iterator[Path]:
    """Database of the tracking server, which is started when all faults are over."""
    for done in harm.values():
        done.exception()  # raised by its own test
    folder = slurm.folder / "served"
    folder.mkdir()
    with mlflow_server(folder, int(server.rpartition(":")[2])):
        yield folder / "mlflow.db"


@pytest.mark.parametrize("nodes", SIZES)
def test_lost_ranks_signals_requeues_and_lost_nodes(nodes, slurm, jobs, harm, whole, served, monkeypatch):
    """The tracking server of this run is down all the time, and gets everything afterwards."""
    job, run = jobs[f"hurt-{nodes}"], slurm.folder / "runs" / f"hurt-{nodes}"
    harm[nodes].result()
    assert job.restarts == 3 and job.starts() == 6, job.log()
    assert_same(run, whole[nodes])
    assert_every_sample_once(run, nodes)
    monkeypatch.chdir(slurm.folder)
    assert sync(run, timeout=60)
    assert_one_tracked_run(served, run.name)


def lose_last_node(slurm: Slurm, job: Job) -> None:
    """And tell Slurm of it, as a health check would, until it stays so: a sign of life that the node sent before may
    still be on its way to a busy controller, and brings it back."""
    node = job.nodes()[-1]
    slurm.lose(job, node)
    for _ in range(6):
        if "State=DOWN" not in slurm.ask("scontrol", "--oneliner", "show", "node", node):
            slurm.ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
        time.sleep(0.5)


@pytest.mark.parametrize("nodes", SIZES)
def test_a_time_limit_of_a_minute_is_met_and_the_job_requeues_itself(nodes, slurm, jobs, whole, monkeypatch):
    job, run = jobs[f"limited-{nodes}"], slurm.folder / "runs" / f"limited-{nodes}"
    assert job.wait(LIMIT) == "COMPLETED", job.log()
    assert job.restarts >= 1 and "back into the queue" in job.log()
    assert job.starts() == job.restarts + 1, job.log()
    assert_same(run, whole[nodes])
    assert_every_sample_once(run, nodes)
    monkeypatch.chdir(slurm.folder)
    assert sync(run, timeout=60)  # what short launches had no time to send, on a machine under load
    assert_one_tracked_run(slurm.folder / "runs" / "mlflow.db", run.name)


def test_evaluations_as_an_array_and_preparation(slurm, whole):
    run = whole[2]
    (slurm.folder / "grid.txt").write_text(f"{run} --mask-ratio 0.15\n{run} --mask-ratio 0.3\n")
    (slurm.folder / "mine.smi").write_text("\n".join(MOLECULES) + "\n")
    options = ["--gpus-per-node=1", "--array=1-2", "--output=evaluate-%a.log"]
    grid = slurm.submit(ROOT / "slurm" / "evaluate.sh", options=options, EXLM_SWEEP="grid.txt")
    wanted = ["smiles", "--input", "mine.smi", "--out", "mine", "--valid-fraction", "0.2"]
    prepared = slurm.submit(ROOT / "slurm" / "prepare.sh", *wanted, options=[])
    assert prepared.wait(LIMIT) == "COMPLETED", prepared.log()
    assert (slurm.folder / "mine" / "manifest.json").is_file()
    printed = []
    for number in ("1", "2"):
        task = Job(slurm, f"{grid.number}_{number}")
        assert task.wait(LIMIT) == "COMPLETED", task.log()
        printed.append((slurm.folder / f"evaluate-{number}.log").read_text())
    assert "nll" in printed[0] and printed[0] != printed[1]


def assert_same(run: Path, other: Path) -> None:
    """Parameters and optimizer states of the last step are the same bits."""
    name = f"checkpoints/step-{STEPS:08d}"
    for load in (reader.load_weights, reader.load_optimizer):
        ours, theirs = load(run / name), load(other / name)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours)


def assert_every_sample_once(run: Path, nodes: int) -> None:
    """In every epoch, by what the ranks themselves recorded."""
    assert len(list((run / "samples").glob("rank-*.jsonl"))) == nodes
    seen = samples_of_steps(run)
    assert list(seen) == list(range(STEPS))
    per_epoch = SAMPLES // BATCH
    for first in range(0, STEPS, per_epoch):
        epoch = sorted(sample for step in range(first, first + per_epoch) for sample in seen[step])
        assert epoch == list(range(SAMPLES))


def assert_one_tracked_run(database: Path, name: str) -> None:
    """MLflow has one run of that name, with each point once."""
    with sqlite3.connect(database, timeout=10) as connection:
        found = connection.execute("select run_uuid, status from runs where name = ?", [name]).fetchall()
        assert [status for _, status in found] == ["FINISHED"]
        query = "select step from metrics where run_uuid = ? and key = 'train/loss' order by step"
        points = [step for (step,) in connection.execute(query, [found[0][0]])]
    assert points == list(range(10, STEPS + 1, 10))


@pytest.mark.slow
def test_a_lost_node_that_slurm_finds_by_itself(slurm):
    """Takes minutes: this Slurm gives up a silent node after one."""
    make_data(slurm.folder / "data-lost")
    (slurm.folder / "lost.yaml").write_text(
        yaml.safe_dump({"name": "undisturbed", **TINY, "data": {"path": "data-lost"}})
    )
    options = ["--nodes=2", "--gpus-per-node=1", "--time=30"]
    other = slurm.submit(PRETRAIN, "lost.yaml", options=options)
    job = slurm.submit(PRETRAIN, "lost.yaml", "--name", "lost", options=options)
    run = slurm.folder / "runs" / "lost"
    run_until(lambda: newest_step(run) > 0, job, "checkpoint", LIMIT)
    slurm.lose(job, job.nodes()[1])
    assert job.wait(600) == "COMPLETED" and job.restarts >= 1, job.log()
    assert other.wait(LIMIT) == "COMPLETED"
    assert_same(run, slurm.folder / "runs" / "undisturbed")
    assert_every_sample_once(run, 2)


@pytest.mark.parametrize("nodes", SIZES)
def test_the_demonstration_trains_to_its_end(nodes, slurm, jobs):
    """The configuration that a new user tries first."""
    job = jobs[f"demo-{nodes}"]
    assert job.wait(LIMIT) == "COMPLETED" and job.starts() == 1, job.log()
    assert newest_step(slurm.folder / "runs" / f"demo-{nodes}") == 200 and job.facts()["NumNodes"] == str(nodes)
