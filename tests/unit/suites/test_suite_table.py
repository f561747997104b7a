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
from exlm_dist.suites.pretraining_seeds import pooled_table
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


def method(step: int, run: str = "/runs/a", **facts: str) -> Method:
    named = {"run": run, "step": step, "objective": "exlm", "shape": "s", **facts}
    label = f"{Path(run).name}@{step}"
    return Method("checkpoint", label, f"{label}-{hash(run) % 1000}", None, False, named)


def written(out: Path, cell: Cell, value: float | None = 0.5) -> None:
    path = cell.path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    scores = {part: {"roc_auc": value, "skipped": 0.0} for part in ("valid", "test")}
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


def test_runs_that_differ_in_their_seeds_alone_are_one_column(tmp_path: Path) -> None:
    """Mean and sd over the runs, each with the mean of its trainings; other recipes and other steps stay apart."""
    open_folder(tmp_path / "out", {"suite": "moleculenet", "protocol": "unimol", "grid": [[]]})
    values = {"/runs/exlm_0": (0.6, 0.8), "/runs/exlm_1": (0.8, 0.9), "/runs/plain": (0.5, 0.7)}
    for run, own in values.items():
        facts = {"recipe": "r" if "exlm" in run else "p"}
        for seed, value in enumerate(own):
            written(tmp_path / "out", Cell("bbbp", "scaffold", method(9, run, **facts), (), seed), value)
    written(tmp_path / "out", Cell("bbbp", "scaffold", method(5, "/runs/exlm_1", recipe="r"), (), 0), 0.1)
    for run, value in (("/runs/exlm_0", 0.3), ("/runs/exlm_1", None)):
        written(tmp_path / "out", Cell("bace", "scaffold", method(9, run, recipe="r"), (), 0), value)
    table = read_table(tmp_path / "out")
    pooled = pooled_table(table)
    assert pooled is not None
    keys = {column.label: column.key for column in pooled.columns}
    assert set(keys) == {"exlm (2 runs)@9", "plain@9", "exlm_1@5"}
    entry = pooled.entries["bbbp", "scaffold", keys["exlm (2 runs)@9"]]
    assert entry.best.mean == pytest.approx((0.7 + 0.85) / 2) and entry.best.seeds == 2 and entry.seeded
    assert entry.best.sd == pytest.approx(abs(0.7 - 0.85) / math.sqrt(2))
    assert pooled.entries["bbbp", "scaffold", keys["plain@9"]].best.mean == pytest.approx(0.6)
    assert math.isnan(pooled.entries["bace", "scaffold", keys["exlm (2 runs)@9"]].best.mean), "undefined for a run"


def test_without_repeated_pretrainings_nothing_is_pooled(tmp_path: Path) -> None:
    open_folder(tmp_path / "out", {"suite": "moleculenet", "protocol": "unimol", "grid": [[]]})
    for run, facts in (("/runs/a", {"recipe": "r"}), ("/runs/b", {"recipe": "s"}), ("/runs/c", {}), ("/runs/d", {})):
        written(tmp_path / "out", Cell("bbbp", "scaffold", method(9, run, **facts), (), 0))
    assert pooled_table(read_table(tmp_path / "out")) is None, "checkpoints of unknown recipe are not the same either"


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
