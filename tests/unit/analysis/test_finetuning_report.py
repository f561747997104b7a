"""The report of a fine-tuned model, and its record in MLflow, from folders made by hand."""

from __future__ import annotations

import csv
import json
import logging
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exlm_dist.analysis.finetuning_figures import errors_by_spread
from exlm_dist.analysis.finetuning_report import finetuning_report
from exlm_dist.analysis.finetuning_results import read_results
from exlm_dist.cli import main
from exlm_dist.config import RunConfig, dump_config
from exlm_dist.finetuning import finetuning_tracking
from exlm_dist.finetuning.finetune_settings import METRICS
from exlm_dist.finetuning.finetuning_tracking import record_finetuning
from exlm_dist.tracking import EventLog, read_events, sync
from exlm_dist.utils.errors import CheckpointError

ACTIVE = {"name": "active", "kind": "binary", "classes": ["0", "1"]}
KIND = {"name": "kind", "kind": "multiclass", "classes": ["a", "b", "c"]}
VALUE = {"name": "log $S$ | mol", "kind": "regression", "classes": None}
#: Values of a member, and their standard deviation (None: of a single member).
MEAN, SD = 0.625, 0.125


def make_model(
    folder: Path,
    targets: Sequence[dict[str, Any]],
    rows: Sequence[dict[str, Any]],
    *,
    members: int = 2,
    tracking: dict[str, Any] | None = None,
    checkpoint: str = "/runs/zinc/checkpoints/step-00000009",
) -> Path:
    """A folder as `exlm finetune` writes it, without weights. `rows`: of predictions.csv, with their `part`."""
    task = "regression" if targets[0]["kind"] == "regression" else "classification"
    names, parts = METRICS[task], [part for part in ("test", "valid") if any(row["part"] == part for row in rows)]
    scores = {**dict.fromkeys(names, MEAN), names[-1]: None, "skipped": 0.0}
    summary = {name: {"mean": value, "sd": SD if members > 1 else None} for name, value in scores.items()}
    counts = {
        part: {label: 3 + n for n, label in enumerate(target["classes"])} if target["classes"] else {"values": 3}
        for part in ("train", "valid", "test")
        for target in targets[:1]
    }
    record = {
        "format": 1,
        "inputs": ["smiles"],
        "targets": [
            {
                **target,
                "mean": None,
                "std": None,
                "counts": counts
                if target is targets[0]
                else {part: dict.fromkeys(target["classes"] or ["values"], 2) for part in ("train", "valid", "test")},
            }
            for target in targets
        ],
        "settings": {"metric": names[0], "epochs": 3, "lr": 5e-4, "split_sizes": [0.8, 0.1, 0.1]},
        "split": {"kind": "scaffold", "hash": "ab" * 32, "sizes": {"test": 5, "train": 30, "valid": 7}},
        "checkpoint": {"path": checkpoint, "step": 9, "sha256": "cd" * 32},
        "budget": "unit-test",
        "rows": {"read": 45, "used": 42, "failed": 3},
        "metrics": {part: summary for part in parts},
        "ensemble": {part: {**scores, names[0]: 0.75} for part in parts},
        "members": [
            {"seed": 4 + n, "best_epoch": 2, "epochs": 3, "sha256": "ef" * 32, **{part: scores for part in parts}}
            for n in range(members)
        ],
        "versions": {"exlm_dist": "0.1.0"},
    }
    folder.mkdir(parents=True)
    (folder / "finetuned.json").write_text(json.dumps(record))
    config = RunConfig.model_validate(
        {
            "name": "zinc",
            "runs": str(folder.parent),
            "data": {"path": "data"},
            "schedule": {"steps": 9},
            "tracking": tracking or {},
        }
    )
    (folder / "config.yaml").write_text(dump_config(config))
    for number in range(members):
        epochs = [
            {
                "epoch": epoch,
                "lr": 0.001 / epoch,
                "train_loss": 1 / epoch,
                "valid_loss": 2 / epoch,
                "seconds": 1.5,
                "valid": {**scores, names[0]: MEAN if epoch == 2 else None},
            }
            for epoch in (1, 2, 3)
        ]
        (folder / f"member-{number}").mkdir()
        (folder / f"member-{number}" / "history.json").write_text(json.dumps(epochs))
    with open(folder / "predictions.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["file", "row", *rows[0]])
        writer.writeheader()
        writer.writerows({"file": "t.csv", "row": n, **row} for n, row in enumerate(rows))
    return folder


def binary_row(part: str, truth: str, probability: float, name: str = "active") -> dict[str, Any]:
    return {
        "part": part,
        name: truth,
        f"{name}_probability": probability,
        f"{name}_spread": 0.1,
        f"{name}_prediction": str(int(probability >= 0.5)),
    }


BINARY = [
    *(binary_row("test", truth, p) for truth, p in (("0", 0.1), ("1", 0.4), ("0", 0.6), ("1", 0.9), ("", 0.5))),
    *(binary_row("valid", truth, p) for truth, p in (("1", 0.2), ("0", 0.3))),
]


def figures(model: Path) -> set[str]:
    """Names of the PNGs, each of which begins as a PNG does."""
    found = set((model / "report").glob("*.png"))
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in found)
    return {path.stem for path in found}


def test_a_binary_target(tmp_path: Path) -> None:
    model = make_model(tmp_path / "bbbp", [ACTIVE], BINARY)
    assert main(["report", str(model)]) == 0
    page = (model / "report" / "report.md").read_text()
    assert figures(model) == {"epochs", "target_1"}
    assert all(f"({name}.png)" in page for name in figures(model))
    assert "| test | roc_auc | 0.6250 | 0.1250 | 0.7500 |" in page and "| test | f1 | - | 0.1250 | - |" in page
    assert page.index("| valid | roc_auc |") < page.index("| test | roc_auc |")
    assert "45 read, 42 used, 3 failed" in page and "train 30, valid 7, test 5" in page
    assert "budget unit-test" in page and "sha256 `cdcdcdcdcdcd`" in page
    # (0.1, 0.6) of class 0 against (0.4, 0.9) of class 1: three of four pairs are in order.
    assert "| active | binary | 7, positive (1): 4 | 7, positive (1): 4 | 7, positive (1): 4 | 0.7500 |" in page
    assert "| 5 | 3 | 2 | 0.6250 | 0.6250 |" in page
    assert "Fewer than 10 labels of a class in the valid or test part, so noisy metrics: active." in page


def test_labels_and_values_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [
        {"kind": "c", "kind_probability_a": 0.2, "kind_probability_b": 0.3, "kind_probability_c": 0.5},
        {"kind": "", "kind_probability_a": 1, "kind_probability_b": 0, "kind_probability_c": 0},
        {"kind": "a", "kind_probability_a": 0.1, "kind_probability_b": 0.8, "kind_probability_c": 0.1},
    ]
    rows = [{"part": "test", **row, "kind_spread": "", "kind_prediction": "b"} for row in rows]
    results = read_results(make_model(tmp_path / "kinds", [KIND], rows, members=1))
    (one,) = results.parts["test"]
    assert one.labels.tolist() == [2, 0] and one.values.tolist() == [[0.2, 0.3, 0.5], [0.1, 0.8, 0.1]]
    assert np.isnan(one.spread).all() and one.metrics["accuracy"] == 0.5
    finetuning_report(results.folder)
    assert figures(results.folder) == {"epochs", "target_1"}


@pytest.mark.parametrize(("members", "part"), [(3, "test"), (1, "valid")])
def test_a_regression_with_one_or_several_members_and_with_or_without_a_test_part(
    tmp_path: Path, members: int, part: str
) -> None:
    name, spread = VALUE["name"], 0.2 if members > 1 else ""
    rows = [
        {"part": part, name: y, f"{name}_mean": y + error, f"{name}_spread": spread}
        for y, error in ((-4.0, 0.3), (-2.0, -0.4), (1.5, 0.0))
    ]
    model = make_model(tmp_path / "esol", [VALUE], rows, members=members)
    page = finetuning_report(model)
    assert figures(model) == {"epochs", "target_1"}
    rmse = np.sqrt((0.3**2 + 0.4**2) / 3)
    assert rf"| log $S$ \| mol | regression | 3 | 3 | 3 | {rmse:.4f} |" in page and f"rmse ({part})" in page
    assert f"| {part} | rmse | 0.6250 | {'0.1250' if members > 1 else '-'} | 0.7500 |" in page


def test_of_many_targets_one_overview_with_those_on_which_the_metric_is_undefined(tmp_path: Path) -> None:
    targets = [{**ACTIVE, "name": f"t{n}"} for n in range(5)]
    rows = [
        {"part": "test"}
        | {
            key: value
            for n in range(5)  # all labels of the last target are of one class
            for key, value in binary_row("test", "1" if n == 4 else truth, p, f"t{n}").items()
        }
        for truth, p in (("0", 0.2), ("1", 0.7), ("1", 0.1))
    ]
    model = make_model(tmp_path / "tox", targets, rows)
    page = finetuning_report(model)
    assert figures(model) == {"epochs", "targets"}
    assert "| t3 | binary | 4, positive (1): 2 |" in page and page.count("0.5000 |") == 4
    assert "| t4 | binary | 4, positive (1): 2 | 4, positive (1): 2 | 4, positive (1): 2 | - |" in page


def test_a_single_class_or_no_label_is_drawn_as_such(tmp_path: Path) -> None:
    for name, truth in (("one", "1"), ("none", "")):
        rows = [binary_row("test", truth, p) for p in (0.2, 0.7)]
        model = make_model(tmp_path / name, [ACTIVE], rows)
        assert "positive (1): 4 | - |" in finetuning_report(model)
        assert figures(model) == {"epochs", "target_1"}


def test_long_names_and_formulas_are_drawn_as_text(tmp_path: Path) -> None:
    classes = [f"$\\frac{{{number}" + "x" * 30 for number in range(14)]
    target = {"name": "$\n_" + "y" * 90, "kind": "multiclass", "classes": classes}
    chances = {f"{target['name']}_probability_{label}": 1 / 14 for label in classes}
    rows = [
        {"part": "test", target["name"]: label, **chances, f"{target['name']}_spread": 0.1}
        for label in classes
        for _ in range(2)
    ]
    finetuning_report(make_model(tmp_path / "kinds", [target], rows))
    assert figures(tmp_path / "kinds") == {"epochs", "target_1"}


def test_errors_as_large_as_the_spread_are_on_the_diagonal() -> None:
    rng = np.random.default_rng(1)
    spread = rng.uniform(0.1, 3, 5000)
    spreads, errors = errors_by_spread(spread, np.abs(rng.normal(size=5000)) * spread)
    assert len(spreads) == 10 and (np.diff(spreads) > 0).all()
    np.testing.assert_allclose(errors, spreads, rtol=0.12)
    spreads, errors = errors_by_spread(np.array([3.0, 4]), np.array([1.0, 1]))
    assert spreads.tolist() == [np.sqrt(12.5)] and errors.tolist() == [1]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no finetuned\.json"):
        finetuning_report(tmp_path)
    model = make_model(tmp_path / "bbbp", [ACTIVE], BINARY)
    (model / "member-1" / "history.json").unlink()
    with pytest.raises(CheckpointError, match=r"member-1.history\.json"):
        finetuning_report(model)
    assert not (model / "report").exists()


def test_mlflow_has_a_run_with_a_child_for_each_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a busy machine making the database may take longer than a user would want to wait for it.
    monkeypatch.setattr(finetuning_tracking, "TRACKING_PATIENCE", 240.0)
    model = make_model(tmp_path / "runs" / "bbbp", [ACTIVE], BINARY)
    (model / "report").mkdir()
    for name in ("report.md", "epochs.png"):
        (model / "report" / name).write_text("drawn")
    record_finetuning(model)
    with sqlite3.connect(tmp_path / "runs" / "mlflow.db") as database:
        runs = database.execute("select name, status, run_uuid from runs order by name").fetchall()
        points = database.execute("select name, key, step, value from metrics join runs using (run_uuid)").fetchall()
        tags = database.execute("select name, key, tags.value from tags join runs using (run_uuid)").fetchall()
        params = dict(database.execute("select key, value from params").fetchall())
    assert [run[:2] for run in runs] == [
        (name, "FINISHED") for name in ("bbbp", "bbbp member-0 @2", "bbbp member-1 @2")
    ]
    child = {(key, step): value for name, key, step, value in points if name.endswith("member-1 @2")}
    assert child["finetuning/test_roc_auc", 2] == child["finetuning/valid_roc_auc", 2] == MEAN
    assert ("finetuning/valid_roc_auc", 1) not in child  # undefined in that epoch
    assert [child["finetuning/train_loss", epoch] for epoch in (1, 2, 3)] == [1, 1 / 2, 1 / 3]
    whole = {key: value for name, key, _, value in points if name == "bbbp"}
    assert (whole["finetuning/test_roc_auc_mean"], whole["finetuning/test_roc_auc_ensemble"]) == (MEAN, 0.75)
    for name, _, _ in runs:
        own = {key: value for run, key, value in tags if run == name}
        assert own["task"] == "classification" and own["split"] == "scaffold" and own["budget"] == "unit-test"
        assert own["split.hash"] == "ab" * 32 and own["checkpoint.sha256"] == "cd" * 32
        assert own.get("mlflow.parentRunId") == (None if name == "bbbp" else runs[0][2])
    assert params["finetuning.lr"] == "0.0005" and params["targets"] == "active"
    sent = {path.name for path in (tmp_path / "runs" / "mlartifacts").rglob("report/*")}
    assert sent == {"report.md", "epochs.png"}
    _is_shown_below_the_run_of_its_checkpoint(tmp_path / "runs" / "mlflow.db", tmp_path / "models")


def _is_shown_below_the_run_of_its_checkpoint(database: Path, models: Path) -> None:
    """A model that lies elsewhere goes to the database of that run, as soon as it is there."""
    run = database.with_name("zinc")
    checkpoint = run / "checkpoints" / "step-00000009"
    checkpoint.mkdir(parents=True)
    EventLog(run / "events.jsonl").close()
    model = make_model(models / "esol", [ACTIVE], BINARY, members=1, checkpoint=str(checkpoint))
    (run / "config.yaml").write_text((model / "config.yaml").read_text())
    (model / "report").mkdir()
    record_finetuning(model)
    above = (
        "select above.name from runs join tags using (run_uuid) join runs as above on above.run_uuid = tags.value "
        "where key = 'mlflow.parentRunId' and runs.name = 'esol'"
    )
    with sqlite3.connect(database) as connection:
        assert connection.execute(above).fetchall() == []
        assert sync(run) and sync(model)
        assert connection.execute(above).fetchall() == [("zinc",)]
    assert not (models / "mlflow.db").exists()


def test_a_failure_of_tracking_is_a_warning_and_none_is_asked_where_it_is_off(tmp_path: Path, caplog) -> None:
    bad = make_model(tmp_path / "bad", [ACTIVE], BINARY, tracking={"uri": "file:/somewhere"})
    (bad / "report").mkdir()
    with caplog.at_level(logging.WARNING):
        record_finetuning(bad)
    assert "not recorded in MLflow" in caplog.text and "the model is whole" in caplog.text
    for off, tracking in ((tmp_path / "off", {"mlflow": False}), (tmp_path / "not now", None)):
        (make_model(off, [ACTIVE], BINARY, tracking=tracking) / "report").mkdir()
        record_finetuning(off, send=tracking is not None)
        children = [event["name"] for event in read_events(off / "events.jsonl") if event["kind"] == "child_run"]
        assert children == ["member-0", "member-1"]
    assert not (tmp_path / "mlflow.db").exists()
