"""What is made of the results: means, differences, which column is shown; and fingerprints against known cases."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from exlm_dist.finetuning.targets import Target
from exlm_dist.suites.cells import Busy, Cell, claimed, publish_failure, publish_result, read_results
from exlm_dist.suites.fingerprints import fingerprint_features, predict_from_fingerprints
from exlm_dist.suites.methods import Method
from exlm_dist.suites.out_folder import open_folder
from exlm_dist.suites.suite_table import Entry, difference, read_table


def entry(values: list[float | None], metric: str = "roc_auc", kind: str = "checkpoint") -> Entry:
    results: list[dict[str, Any]] = [
        {"scores": {"test": {metric: value}}, "method": {"kind": kind}} for value in values
    ]
    return Entry("bbbp", "scaffold", "m", metric, {}, 1, results)


def test_a_difference_has_the_interval_of_welchs_test() -> None:
    first, second = [0.71, 0.74, 0.70], [0.66, 0.69, 0.65, 0.60]
    found = difference(entry(first), entry(second))
    interval = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert found.value - found.half_width == pytest.approx(interval.low)
    assert found.value + found.half_width == pytest.approx(interval.high)
    assert found.verdict == "better" and difference(entry(second), entry(first)).verdict == "worse"
    assert difference(entry(second, "rmse"), entry(first, "rmse")).verdict == "better", "smaller errors are better"


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ([0.7], [0.6], "one seed"),
        ([0.7, 0.9], [0.6, 0.8], "no difference"),
        ([0.7, 0.7], [0.6, 0.6], "better"),
        ([0.7, 0.7], [0.7, 0.7], "no difference"),
        ([None, 0.7], [0.7, 0.7], "undefined"),
    ],
)
def test_verdicts_of_the_edges(first: list[float | None], second: list[float | None], verdict: str) -> None:
    assert difference(entry(first), entry(second)).verdict == verdict


def test_what_no_seed_has_a_say_in_has_no_spread() -> None:
    """A linear model of words is trained once: its difference has the interval of the other one alone."""
    words, trained = entry([0.6], kind="linear"), entry([0.70, 0.74])
    found = difference(trained, words)
    assert found.half_width == pytest.approx(float(stats.t.ppf(0.975, 1)) * np.std([0.70, 0.74], ddof=1) / math.sqrt(2))
    assert difference(words, words).verdict == "one seed"


def test_mean_and_sd_are_those_of_a_sample() -> None:
    score = entry([0.5, 0.7, 0.9]).best
    assert score.mean == pytest.approx(0.7) and score.sd == pytest.approx(0.2) and score.seeds == 3
    assert math.isnan(entry([0.5]).best.sd)


def method(step: int, run: str = "/runs/a") -> Method:
    facts = {"run": run, "step": step, "objective": "exlm", "shape": "s"}
    return Method("checkpoint", f"a@{step}", f"a@{step}-{hash(run) % 1000}", None, False, facts)


def written(out: Path, cell: Cell) -> None:
    path = cell.path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    scores = {part: {"roc_auc": 0.5, "skipped": 0.0} for part in ("valid", "test")}
    publish_result(path, {**cell.described(), "metric": "roc_auc", "metrics": ["roc_auc"], "scores": scores})


def test_of_a_run_with_many_checkpoints_the_last_one_is_shown(tmp_path: Path) -> None:
    open_folder(tmp_path / "out", {"suite": "moleculenet", "protocol": "unimol", "grid": [[]]})
    for step in (1, 2, 3, 4):
        written(tmp_path / "out", Cell("bbbp", "scaffold", method(step), (), 0))
    for step in (7, 8):
        written(tmp_path / "out", Cell("bbbp", "scaffold", method(step, "/runs/b"), (), 0))
    table = read_table(tmp_path / "out")
    assert [column.checkpoint["step"] for column in table.columns] == [1, 2, 3, 4, 7, 8]
    assert [column.checkpoint["step"] for column in table.shown] == [4, 7, 8]


def test_a_cell_is_computed_by_one_process_at_a_time(tmp_path: Path) -> None:
    cell = Cell("bbbp", "scaffold", method(1), (("lr", 0.1),), 0)
    path = cell.path(tmp_path)
    with claimed(path) as partial:
        assert partial is not None and partial.is_dir()
        with pytest.raises(Busy), claimed(path):
            pass
        (partial / "kept").write_text("state")
    assert (path.with_suffix(".partial") / "kept").exists(), "an attempt that came to nothing leaves its state"
    publish_failure(path, cell, "why")
    assert [one["reason"] for one in read_results(tmp_path)[1]] == ["why"]
    with claimed(path) as partial:
        written(tmp_path, cell)
    assert not path.with_suffix(".partial").exists() and read_results(tmp_path)[1] == []
    with claimed(path) as partial:
        assert partial is None, "it is there"
    assert not path.with_suffix(".partial").exists()


@pytest.mark.parametrize("kind", ["forest", "boosting"])
def test_trees_learn_what_fingerprints_show_and_survive_targets_of_one_class(kind: str) -> None:
    molecules = [f"{'C' * length}{end}" for length in range(1, 61) for end in ("N", "O")]
    features = fingerprint_features(molecules)
    labels = np.stack([np.array([smiles.endswith("N") for smiles in molecules], float), np.ones(120)], axis=1)
    labels[::7, 0] = np.nan
    labels[:100, 1] = np.nan
    parts = {"train": np.arange(100), "valid": np.arange(100, 110), "test": np.arange(110, 120)}
    targets = [Target("amine", "binary", ("0", "1")), Target("one", "binary", ("0", "1"))]
    predicted = predict_from_fingerprints(kind, features, labels, targets, parts, seed=0, threads=1)
    assert set(predicted) == {"valid", "test"}
    truth = np.array([smiles.endswith("N") for smiles in molecules])[parts["test"]]
    assert ((predicted["test"][:, 0] > 0.5) == truth).all() and (predicted["test"][:, 1] == 0.5).all()
    values = np.array([[float(len(smiles))] for smiles in molecules])
    (line,) = (Target("length", "regression"),)
    of_values = predict_from_fingerprints(kind, features, values, [line], parts, seed=0, threads=1)
    assert np.isfinite(of_values["valid"]).all()
