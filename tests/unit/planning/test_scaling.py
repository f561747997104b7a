"""A layout on other numbers of GPUs: sums that can be made by hand, and goodput beside failures drawn at random."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from unit.planning.test_memory import job

from exlm_dist.cli import main
from exlm_dist.planning import scaling
from exlm_dist.planning.communication import Traffic
from exlm_dist.planning.hardware import Hardware, step_time
from exlm_dist.planning.scaling import SAVED, Cluster, _latency, critical_path, outlook, saved_every, scaled
from exlm_dist.training.engine.deepspeed_config import BUCKET

ROOT = Path(__file__).resolve().parents[3]
HARDWARE = Hardware()
#: Nothing but what a GPU computes and sends.
IDEAL = Cluster(launch=0, hop=0, link_hop=0, control_hop=0, jitter=0, read=0, reads=math.inf, copy=math.inf,
                node_storage=math.inf, storage=math.inf, start=0, failure=math.inf)  # fmt: skip


def test_an_ideal_cluster_leaves_the_step_of_the_planner():
    for layout in ({"data": 8}, {"tensor": 4, "data": 4}, {"pipeline": 2, "data": 2, "accumulation": 4}):
        found = outlook(job(**layout), HARDWARE, IDEAL)
        assert found.path.total == pytest.approx(step_time(job(**layout), HARDWARE).total)
        assert found.goodput == 1


def test_hops_of_each_collective():
    cluster, this = replace(IDEAL, launch=1e6, link_hop=1.0, hop=1000.0), job(data=32)
    seconds = {kind: _latency(this, Traffic("data", kind, "x", 1, 1.0, 32), HARDWARE, cluster)
               for kind in ("all_reduce", "all_gather", "reduce_scatter")}  # fmt: skip
    # Four nodes of eight. A tree has 3 levels in a node and 2 above, a ring 28 steps in nodes and 3 between.
    assert seconds == {"all_reduce": 1e6 + 4006, "all_gather": 1e6 + 3028, "reduce_scatter": 1e6 + 3028}
    assert _latency(this, Traffic("pipeline", "send", "x", 5, 1.0, 2), HARDWARE, cluster) == 5 * (1e6 + 1000)
    assert scaling.BUCKET == BUCKET


def test_agreement_grows_with_the_ranks_and_reading_counts_where_it_is_slower_than_the_step():
    small, large = job(data=8), job(data=64)
    cluster = replace(IDEAL, control_hop=1.0, control_every=2)
    assert (
        critical_path(small, HARDWARE, cluster).control == 3.5
        and critical_path(large, HARDWARE, cluster).control == 31.5
    )
    sequences = small.config.batch.sequences / 8
    step = step_time(small, HARDWARE).total
    assert critical_path(small, HARDWARE, replace(IDEAL, read=step / sequences / 2)).reading == 0
    assert critical_path(small, HARDWARE, replace(IDEAL, read=3 * step / sequences)).reading == pytest.approx(2 * step)


def test_more_replicas_with_more_batch_or_less_accumulation():
    this = job(tensor=2, data=4, accumulation=8)
    more = scaled(this, 32)
    assert (more.data, more.accumulation, more.config.batch.sequences) == (16, 8, 4 * this.config.batch.sequences)
    fixed = scaled(this, 32, fixed_batch=True)
    assert (fixed.data, fixed.accumulation, fixed.config.batch.sequences) == (16, 2, this.config.batch.sequences)
    assert scaled(this, 7) is None and scaled(this, 2 * 3, fixed_batch=True) is None


@pytest.mark.parametrize("every", [20, 200])
def test_goodput_is_that_of_failures_drawn_at_random(every):
    this = saved_every(job(data=8), every)
    useful, checkpoint = step_time(this, HARDWARE).total, SAVED * 1e9
    cluster = replace(IDEAL, start=50 * useful, failure=8 * 4000 * useful)
    cluster = replace(cluster, copy=checkpoint / 8 / useful, node_storage=checkpoint / (9 * useful))
    found = outlook(this, HARDWARE, cluster)
    stall, write = (seconds / useful for seconds in scaling._save_seconds(this, HARDWARE, cluster))
    assert stall > 1 and write > 9
    assert found.goodput == pytest.approx(drawn(every, stall, write, start=50, mean=4000, steps=1_000_000), abs=0.006)
    assert outlook(saved_every(this, found.best_every), HARDWARE, cluster).goodput >= found.goodput


def drawn(every: int, stall: float, write: float, *, start: float, mean: float, steps: int) -> float:
    """Goodput of a run of so many steps, in units of a step: a failure goes back to the newest complete checkpoint.
    The one after `done` steps is complete at `published`."""
    random = np.random.default_rng(0)
    wall, done, complete, published = (
        0.0,
        0,
        0,
        math.inf,
    )
    failure = random.exponential(mean)
    while done < steps:
        end = wall + every + stall
        if failure < end:
            done = done if published <= failure else complete
            complete, published = done, -math.inf
            wall = failure + start + write
            failure = wall + random.exponential(mean)
        else:
            complete, done, wall, published = done, done + every, end, end + write
    return done / wall


def test_the_command_shows_it_without_torch(capsys, monkeypatch):
    config = str(ROOT / "configs/pretrain/exlm_1b_text.yaml")
    assert main(["plan", config, "--gpus", "8", "--top", "1", "--scale", "--failure-hours", "9000"]) == 0
    text = capsys.readouterr().out
    assert "a failure in 9,000 hours of a GPU" in text
    rows = [line.split() for line in text.splitlines()[-10:]]
    assert [int(row[0]) for row in rows] == list(scaling.SIZES) and rows[0][-3] == "100%"
    assert float(rows[-1][-2].rstrip("%")) < float(rows[0][-2].rstrip("%"))
