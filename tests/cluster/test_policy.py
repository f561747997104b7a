"""What the job file does for every way in which its ranks can end."""

from __future__ import annotations

import pytest
from cluster.scenarios import RESTARTS
from cluster.slurm_testbed import Slurm, run_until

LIMIT = 120.0


@pytest.mark.parametrize(
    "scenario, code, number_of_starts, requeues, words",
    [
        ("killed", 0, 2, 0, "the ranks ended with code 137"),
        ("hang", 0, 2, 0, "the ranks ended with code 137"),
        ("moving", 0, 5, 0, "newest checkpoint: step 4"),
        ("saved", 0, 2, 1, "saved: back into the queue"),
        ("silent", 0, 2, 1, "srun failed: back into the queue"),
        ("broken", 2, 1, 0, "cannot import what exlm needs: No module named 'libmissing'"),
        ("absent", 2, 1, 0, "no configuration at gone.yaml"),
        ("data", 77, 1, 0, "shard 7 is gone"),
        ("stop", 78, 1, 0, "too many sequences are left out"),
        ("crash", 1, 1, 0, "Traceback: a bug"),
        ("refused", 2, 0, 0, ""),
        ("stuck", 78, RESTARTS + 1, 0, "none got past the checkpoint of step 0"),
        ("slow", 78, RESTARTS + 2, RESTARTS + 1, "none got past the checkpoint of step 1"),
    ],
)
def test_an_end(scenarios, scenario, code, number_of_starts, requeues, words):
    job = scenarios[scenario]
    assert job.wait(LIMIT) == ("FAILED" if code else "COMPLETED"), job.log()
    assert job.facts()["ExitCode"] == f"{code}:0" and job.restarts == requeues
    assert job.starts() == number_of_starts and words in job.log(), job.log()


def test_the_warning_before_the_time_limit_reaches_the_ranks_at_once(slurm: Slurm, scenarios):
    job = scenarios["warned"]
    run_until((slurm.folder / "scenario-warned" / "ready").exists, job, "rank", LIMIT)
    slurm.ask("scancel", "--signal=USR1", "--batch", job.number)
    assert job.wait(LIMIT) == "COMPLETED" and job.restarts == 1
    assert "the time limit is near: back into the queue" in job.log() and "code 3" not in job.log()


def test_a_cancelled_job_saves_and_does_not_come_back(slurm: Slurm, scenarios):
    job = scenarios["cancelled"]
    run_until((slurm.folder / "scenario-cancelled" / "ready").exists, job, "rank", LIMIT)
    slurm.ask("scancel", job.number)
    assert job.wait(LIMIT) == "CANCELLED" and job.restarts == 0
    assert (slurm.folder / "scenario-cancelled" / "warned").exists() and job.starts() == 1


def test_a_node_that_miscalculates_is_left_out_from_the_next_start_on(slurm: Slurm, scenarios):
    job = scenarios["wrong"]
    assert job.wait(LIMIT) == "COMPLETED" and (job.restarts, job.starts()) == (1, 2), job.log()
    left_out = (slurm.folder / "scenario-wrong" / "left-out").read_text().strip()
    assert f"{left_out} miscalculated: back into the queue" in job.log()
    assert job.facts()["ExcNodeList"] == left_out and left_out not in job.nodes()
