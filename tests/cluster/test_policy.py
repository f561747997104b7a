"""What the job file does for every way in which its ranks can end."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pretended_containers
import pytest
from cluster.scenarios import RESTARTS
from cluster.slurm_testbed import Job, Slurm, run_until

from exlm_dist.launch import slurm as job_files

LIMIT = 120.0


@pytest.mark.parametrize(
    "scenario, code, number_of_starts, requeues, words",
    [
        ("killed", 0, 2, 0, "the ranks ended with code 137"),
        ("hang", 0, 2, 0, "the ranks ended with code 137"),
        ("moving", 0, 5, 0, "newest checkpoint: step 4"),
        ("saved", 0, 2, 1, "saved: back into the queue"),
        ("silent", 0, 2, 1, "srun failed: back into the queue"),
        ("unreachable", 0, 2, 1, "srun failed: back into the queue"),
        ("broken", 2, 1, 0, "cannot import what exlm needs: No module named 'libmissing'"),
        ("absent", 2, 1, 0, "no configuration at gone.yaml"),
        ("data", 77, 1, 0, "shard 7 is gone"),
        ("stop", 78, 1, 0, "too many sequences are left out"),
        ("crash", 1, 1, 0, "Traceback: a bug"),
        ("refused", 2, 0, 0, ""),
        ("stuck", 78, RESTARTS + 1, 0, "none got past the checkpoint of step 0"),
        ("slow", 78, RESTARTS + 2, RESTARTS + 1, "none got 3 steps on before it was time to save"),
        ("short", 78, RESTARTS + 1, RESTARTS, "none got 3 steps on before it was time to save"),
    ],
)
def test_an_end(scenarios, scenario, code, number_of_starts, requeues, words):
    job = scenarios[scenario]
    assert job.wait(LIMIT) == ("FAILED" if code else "COMPLETED"), job.log()
    assert job.facts()["ExitCode"] == f"{code}:0" and job.restarts == requeues
    assert job.starts() == number_of_starts and words in job.log(), job.log()


@pytest.mark.parametrize(
    "scenario, code, words",
    [
        ("gres", 0, "4 ranks on"),
        ("total", 0, "2 ranks on"),
        ("tasks", 0, "4 ranks on"),
        ("uneven", 2, "the nodes of this job have 1 and 2 GPUs"),
        ("unused", 2, "1 tasks on each node, but 2 GPUs"),
        ("odd", 2, "3 tasks (--ntasks) on 2 nodes"),
    ],
)
def test_a_rank_for_each_gpu_whichever_option_asks_for_them(scenarios, scenario, code, words):
    job = scenarios[scenario]
    assert job.wait(LIMIT) == ("FAILED" if code else "COMPLETED"), job.log()
    assert job.facts()["ExitCode"] == f"{code}:0" and words in job.log(), job.log()


def wait_for_ranks(folder: Path, job: Job) -> None:
    """Until both ranks would see a signal."""
    run_until(lambda: len(list(folder.glob("ready-*"))) == 2, job, "ranks", LIMIT)


def test_the_warning_before_the_time_limit_reaches_the_ranks_at_once(slurm: Slurm, scenarios):
    job = scenarios["warned"]
    wait_for_ranks(slurm.folder / "scenario-warned", job)
    slurm.ask("scancel", "--signal=USR1", "--batch", job.number)
    assert job.wait(LIMIT) == "COMPLETED" and job.restarts == 1
    assert "the time limit is near: back into the queue" in job.log() and "code 3" not in job.log()


def test_a_cancelled_job_saves_and_does_not_come_back(slurm: Slurm, scenarios):
    job = scenarios["cancelled"]
    wait_for_ranks(slurm.folder / "scenario-cancelled", job)
    slurm.ask("scancel", job.number)
    assert job.wait(LIMIT) == "CANCELLED" and job.restarts == 0
    assert (slurm.folder / "scenario-cancelled" / "warned").exists() and job.starts() == 1


@pytest.mark.skipif(pretended_containers.flags() is None, reason="unshare --mount is not permitted")
def test_ranks_on_two_nodes_in_a_container(slurm: Slurm, tmp_path):
    """As by pyxis: srun is a stand-in that gives its tasks a namespace, and leaves the rest to the real one."""
    python = """#!/bin/bash
shift 2
source run.txt
case $1 in
    config) [ -e "$data" ] && printf '%s\\n0\\n' "$runs/r" ;;
    *) [ -e "$data" ] && echo "$WORLD_SIZE $LOCAL_RANK $PWD" >"$runs/r/rank-$RANK" ;;
esac
"""
    world = tmp_path / "world"
    for folder in ("data", "runs", "hidden"):
        (world / folder).mkdir(parents=True)
    (slurm.folder / "run.txt").write_text(f"data={world}/data runs={world}/runs\n")
    tools = pretended_containers.install(tmp_path, world, python, pyxis=True)
    mounts = (str(world / "data"), str(world / "runs"))
    (tmp_path / "job.sh").write_text(
        job_files.render(job_files.Job("pretrain", nodes=2, container="exlm:1", mounts=mounts))
    )
    job = slurm.submit(
        tmp_path / "job.sh",
        "run.yaml",
        options=["--nodes=2", "--gpus-per-node=1", "--time=60", f"--output={tmp_path}/job.log"],
        EXLM_PYTHON="",
        EXLM_REAL_SRUN=str(shutil.which("srun")),
        PATH=f"{tools}:{os.environ['PATH']}",
    )
    assert job.wait(LIMIT) == "COMPLETED", job.log()
    found = {path.name: path.read_text() for path in (world / "runs/r").glob("rank-*")}
    assert found == {f"rank-{rank}": f"2 0 {slurm.folder}\n" for rank in range(2)}


def test_a_node_that_miscalculates_is_left_out_from_the_next_start_on(slurm: Slurm, scenarios):
    job = scenarios["wrong"]
    assert job.wait(LIMIT) == "COMPLETED" and (job.restarts, job.starts()) == (1, 2), job.log()
    left_out = (slurm.folder / "scenario-wrong" / "left-out").read_text().strip()
    assert f"{left_out} miscalculated: back into the queue" in job.log()
    assert job.facts()["ExcNodeList"] == left_out and left_out not in job.nodes()
