"""Evaluated checkpoints as LoggedModels: ranked by their metrics, registered once, whatever is sent again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from exlm_dist.tracking import EventLog, read_events, sync
from exlm_dist.tracking.store import import_mlflow

METRIC = "moleculenet/bbbp_scaffold_test_roc_auc"


def models(folder: Path, **order: Any) -> list[Any]:
    """All LoggedModels in the database of a run folder, as a user asks for them."""
    mlflow = import_mlflow()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder.parent}/mlflow.db")
    experiments = [one.experiment_id for one in client.search_experiments()]
    return list(client.search_logged_models(experiments, order_by=[order] if order else None))


def tags(step: int) -> dict[str, Any]:
    return {"checkpoint.step": step, "checkpoint.path": f"/runs/tiny/step-{step}", "checkpoint.sha256": f"{step:064d}"}


def test_checkpoints_are_ranked_by_their_metrics_and_registered_once(make_run, query):
    """Sent as it comes, and once more from the beginning, to the same end; a later result replaces an earlier one,
    and models of weights that are given up have failed."""
    folder, _ = make_run(model={"width": 64, "heads": 4})
    log = EventLog(folder / "events.jsonl")
    log.params({"model.width": 64, "model.layers": 2, "tracking.experiment": "exlm"})
    for step, nll, area in ((20, 1.5, 0.7), (10, 2.0, 0.8), (30, 1.0, 0.6)):
        log.child_run("evaluation", step, {"valid/nll": nll}, tags(step))
        log.child_run("moleculenet-bbbp-seed0", step, {"moleculenet/test_roc_auc": area}, tags(step))
        log.checkpoint(step, {METRIC: area}, {**tags(step), "moleculenet.protocol": "quick"})
    time.sleep(0.002)  # MLflow keeps one value for each millisecond
    log.checkpoint(30, {METRIC: 0.75}, tags(30))
    log.checkpoint(30, {METRIC: 0.75}, tags(30))  # known: no line
    log.register(10, "molecules", "the best", tags(10))
    assert len([event for event in read_events(folder / "events.jsonl") if event["kind"] == "checkpoint"]) == 4

    for _ in range(2):
        assert sync(folder, timeout=200)
        found = models(folder, field_name=f"metrics.{METRIC}", ascending=False)
        assert [one.name for one in found] == ["tiny-step-10", "tiny-step-30", "tiny-step-20"]
        best_nll = models(folder, field_name="metrics.valid/nll", ascending=True)
        assert [one.name for one in best_nll] == ["tiny-step-30", "tiny-step-20", "tiny-step-10"]
        first = found[0]
        assert first.params == {"model.width": "64", "model.layers": "2"} and first.status == "READY"
        assert first.tags["checkpoint.sha256"] == f"{10:064d}" and first.tags["moleculenet.protocol"] == "quick"
        assert {metric.key for metric in first.metrics} == {"valid/nll", METRIC}  # of all tasks, no seed's own
        curve = f"select step, value from metrics where key = '{METRIC}' order by step, timestamp, value"
        assert query(curve) == [(10, 0.8), (20, 0.7), (30, 0.6), (30, 0.75)]
        assert query("select version, description from model_versions") == [(1, "the best")]
        assert query("select name, alias, version from registered_model_aliases") == [("molecules", "champion", 1)]
        (folder / "tracking.json").unlink()

    log.resumed(10)
    log.child_run("evaluation", 20, {"valid/nll": 3.0}, tags(20))
    log.close()
    assert sync(folder, timeout=200)
    states = {one.name: str(one.status) for one in models(folder)}
    assert states == {"tiny-step-10": "READY", "tiny-step-20": "READY", "tiny-step-30": "FAILED"}


def test_what_describes_given_up_weights_stands_no_longer(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.checkpoint(20, {METRIC: 0.5}, {})
    log.register(20, "molecules", "the best", {})
    log.checkpoint(10, {METRIC: 0.4}, {})
    log.resumed(10)
    log.checkpoint(20, {METRIC: 0.5}, {})
    log.close()
    events = [(one["kind"], one.get("step")) for one in read_events(tmp_path / "events.jsonl")][1:]
    assert events == [("checkpoint", 10), ("resumed", 10), ("checkpoint", 20)]
