"""Tables of runs at equal steps and equal seconds."""

from __future__ import annotations

import math

import pytest

from exlm_dist.config import RunConfig, dump_config
from exlm_dist.evaluation.compare import compare
from exlm_dist.evaluation.history import read_history
from exlm_dist.tracking import EventLog
from exlm_dist.utils.errors import CheckpointError


@pytest.fixture
def make_curve(tmp_path):
    """Run with held-out points {step: nll} and a constant time per step."""

    def make(name, points, seconds_per_step, objective="exlm", **more):
        model = {"objective": "mlm", "states": 1, "anchors": False} if objective == "mlm" else {}
        config = RunConfig.model_validate(
            {
                "name": name,
                "budget": "b" if name != "bare" else "",
                "data": {"path": "d"},
                "schedule": {"steps": 10},
                "model": model,
            }
        )
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(dump_config(config))
        log = EventLog(folder / "events.jsonl")
        for step, nll in points.items():
            log.metrics(step, {"valid/nll": nll, "valid/accuracy": 1 / (1 + nll), "perf/tokens_per_second": 100.0})
            if more:
                log.metrics(step, {f"valid/{key}": value for key, value in more.items()})
            if seconds_per_step:
                log.metrics(step, {"progress/seconds": step * seconds_per_step})
        log.close()
        return folder

    return make


def test_equal_steps_and_equal_seconds(make_curve):
    slow = make_curve("slow", {100: 3.0, 200: 2.0, 300: 1.0}, 2.0)
    fast = make_curve("fast", {100: 3.5, 250: 2.0}, 1.0, "mlm")
    table = compare([slow, fast])
    assert (table.steps, table.seconds) == (250, 250)
    first, second = table.rows
    assert first.nll_at_steps == pytest.approx(1.5) and second.nll_at_steps == 2.0
    assert first.nll_at_seconds == pytest.approx(2.75) and second.nll_at_seconds == 2.0  # 250 s are 125 slow steps
    assert (first.states, second.states, first.objective, second.objective) == (4, 1, "exlm", "mlm")
    for text in (str(table), table.markdown()):
        assert "nll @250 steps" in text and "nll @250 s" in text and "2.7500" in text
    assert [len(line.split("|")) for line in table.markdown().splitlines()] == [15] * 4


def test_the_joint_of_each_kind_of_run(make_curve):
    runs = [
        make_curve("today", {10: 3.0, 20: 1.0}, 1.0, joint_nll=0.5, objective_nll=0.4),
        make_curve("before", {10: 3.0, 20: 1.0}, 1.0, joint_nll=0.4),
        make_curve("plain", {10: 3.0, 20: 1.0}, 1.0, "mlm", joint_nll=0.4),
    ]
    today, before, plain = compare(runs).rows
    assert (today.joint_at_steps, today.joint_at_seconds) == (0.5, 0.5)
    assert math.isnan(before.joint_at_steps) and math.isnan(before.joint_at_seconds)
    assert (plain.joint_at_steps, plain.joint_at_seconds) == (1.0, 1.0)


def test_every_row_carries_its_budget(make_curve):
    table = compare([make_curve("one", {1: 1.0}, 1.0), make_curve("bare", {1: 1.0}, 1.0)])
    assert [row.budget for row in table.rows] == ["b", "budget not labelled"]


def test_what_was_not_logged_is_a_dash(make_curve):
    table = compare([make_curve("none", {}, 0), make_curve("clockless", {5: 1.0}, 0)])
    assert math.isnan(table.seconds) and table.steps == 5
    assert "–" in str(table) and table.rows[1].nll_at_steps == 1.0 and math.isnan(table.rows[0].nll_at_steps)


def test_history(make_curve):
    history = read_history(make_curve("one", {10: 2.0, 20: 1.0}, 0.5))
    assert history.kind == "ExLM k=4" and history.last_step == 20
    assert history.seconds(history.series("valid/nll").steps).tolist() == [5.0, 10.0]
    assert len(history.series("unheard of")) == 0


def test_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="no run folder"):
        compare([tmp_path])
