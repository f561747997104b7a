"""Linear probes: what they predict, that each molecule is embedded once, and how their results are compared."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_run import make_run
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score, root_mean_squared_error
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from exlm_dist.checkpoint.reader import read_config
from exlm_dist.cli import main
from exlm_dist.finetuning import ensemble
from exlm_dist.finetuning.splits import Parts
from exlm_dist.finetuning.targets import Target
from exlm_dist.suites.cells import Busy, read_results
from exlm_dist.suites.embedded_tasks import Embedded, embedded
from exlm_dist.suites.linear_probe import STRENGTHS, predict_by_probe
from exlm_dist.suites.suite_table import difference, read_table

PARTS: Parts = {"train": np.arange(60), "valid": np.arange(60, 80), "test": np.arange(80, 100)}


def problem() -> tuple[np.ndarray, np.ndarray]:
    """100 rows of five features, one of which says nothing, and what they say with noise."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(100, 5)).astype(np.float32) * [1, 10, 0.1, 3, 0] + 4
    return features, features[:, 1] + 30 * features[:, 2] + rng.normal(size=100) * 8


def binary(name: str) -> Target:
    return Target(name, "binary", ("0", "1"))


def test_classes_are_those_of_scikit_learn_with_the_best_strength_of_the_validation_part() -> None:
    features, values = problem()
    labels = np.stack([(values > 124).astype(float), np.ones(100), (values > 116).astype(float)], 1)
    labels[::3, 2] = np.nan
    labels[60:80, 1] = [0, 1] * 10  # two classes, but not in the training part
    targets = [binary(name) for name in ("full", "constant", "gaps")]
    predicted, strength = predict_by_probe(features, labels, targets, PARTS, "roc_auc")
    assert set(predicted) == {"valid", "test"}
    scores = {}
    for candidate in STRENGTHS:
        columns = []
        for column in (0, 2):
            known = ~np.isnan(labels[:60, column])
            scaler = StandardScaler().fit(features[:60])
            model = make_pipeline(scaler, LogisticRegression(C=candidate, max_iter=10_000, tol=1e-9))
            model.steps[1][1].fit(scaler.transform(features[:60][known]), labels[:60, column][known])
            columns.append(model)
        known = ~np.isnan(labels[60:80, 2])
        first, last = (model.predict_proba(features[60:80])[:, 1] for model in columns)
        aucs = roc_auc_score(labels[60:80, 0], first), roc_auc_score(labels[60:80, 2][known], last[known])
        scores[candidate] = (aucs[0] + 0.5 + aucs[1]) / 3, [m.predict_proba(features[80:])[:, 1] for m in columns]
    best = max(scores, key=lambda candidate: scores[candidate][0])
    assert strength == best
    assert np.allclose(predicted["test"][:, [0, 2]], np.stack(scores[best][1], 1), atol=1e-4)
    assert (predicted["test"][:, 1] == 1).all()


def test_values_are_those_of_a_ridge_regression() -> None:
    features, values = problem()
    predicted, strength = predict_by_probe(features, values[:, None], [Target("y", "regression")], PARTS, "rmse")
    scaled = StandardScaler().fit(features[:60]).transform(features)
    models = {one: Ridge(1 / one).fit(scaled[:60], values[:60]) for one in STRENGTHS}
    errors = {
        one: root_mean_squared_error(values[60:80], model.predict(scaled[60:80])) for one, model in models.items()
    }
    assert strength == min(errors, key=lambda one: errors[one])
    assert np.allclose(predicted["test"][:, 0], models[strength].predict(scaled[80:]))


def test_each_molecule_is_embedded_once_for_all_splits_and_seeds(
    arguments: list[str],
    runs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of two runs, and of the initial weights of two seeds; the same again embeds nothing, another split neither."""
    counts: list[int] = []
    original = ensemble.embed_encoded

    def counting(loaded: Any, encoded: Any, *rest: Any) -> np.ndarray:
        counts.append(len(encoded.lengths))
        return original(loaded, encoded, *rest)

    monkeypatch.setattr(ensemble, "embed_encoded", counting)
    copies = {str(run): str(shutil.copytree(run, tmp_path / run.name)) for run in runs}  # others count their events
    arguments = [*(copies.get(one, one) for one in arguments if one != "fingerprints"), "--embed-once"]
    assert main([*arguments, "--splits", "scaffold", "random"]) == 0
    assert counts == [61] * 4
    assert capsys.readouterr().out.count(": 61 molecules embedded in ") == 4
    results, _ = read_results(tmp_path / "out")
    assert [one["seed"] for one in results if one["method"]["kind"] == "checkpoint"] == [0] * 4
    assert [one["seed"] for one in results if one["method"]["kind"] == "random"] == [0, 1] * 2
    assert all(one["method"]["probe"] and "strength" in one for one in results)
    assert main([*arguments, "--splits", "random", "scaffold-chiral"]) == 0
    assert len(counts) == 4

    table = read_table(tmp_path / "out")
    assert [one.label for one in table.columns] == ["random linear", "tiny_exlm@100 linear", "tiny_mlm@100 linear"]
    initial, exlm, plain = (table.entries["bbbp", "random", one.key] for one in table.columns)
    against = difference(exlm, initial)  # the sd is that of the initial weights alone
    own = initial.best
    assert math.isclose(against.half_width, 12.706204736 * own.sd / math.sqrt(2), rel_tol=1e-6)
    assert difference(exlm, plain).verdict == "one seed"
    page = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "**tiny_exlm@100 linear** against random initial weights" in page
    assert "| tiny_exlm@100 linear | ExLM, k=4 | 100 |" in page
    assert "## Over the seeds" not in page

    again = make_run(read_config(runs[0]).model_copy(update={"name": "tiny_exlm_1", "seed": 1, "runs": str(tmp_path)}))
    more = [str(again) if one == copies[str(runs[1])] else one for one in arguments]
    assert main([*more, "--splits", "random"]) == 0
    page = (tmp_path / "out" / "report" / "report.md").read_text()
    pooled = page.partition("## Over the seeds of the pretraining")[2].partition("\n## ")[0]
    entries = read_table(tmp_path / "out").entries
    values = [one.best.mean for (_, split, key), one in entries.items() if split == "random" and "tiny_exlm" in key]
    assert len(values) == 2 and f"{np.mean(values):.3f} \u00b1 {np.std(values, ddof=1):.3f}" in pooled
    assert "**tiny_exlm (2 runs)@100 linear** against random initial weights" in pooled


def test_probes_and_trained_heads_are_asked_for_apart(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--frozen", "--embed-once"]) == 2
    assert "say what is trained: give one of them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_embeddings_are_whole_or_made_again(tmp_path: Path) -> None:
    path, made = tmp_path / "folder" / "bbbp.npz", []

    def compute() -> Embedded:
        made.append(1)
        return Embedded(np.arange(6, dtype=np.float32).reshape(2, 3), 4, 5)

    for expected in (1, 1):
        found = embedded(path, compute)
        assert len(made) == expected and (found.truncated, found.unknown) == (4, 5)
        assert found.features.dtype == np.float32 and found.features.tolist() == [[0, 1, 2], [3, 4, 5]]
    path.write_bytes(path.read_bytes()[:100])
    embedded(path, compute)
    assert len(made) == 2
    path.unlink()

    def ask_again() -> Embedded:
        with pytest.raises(Busy):
            embedded(path, compute, wait=False)
        return compute()

    embedded(path, ask_again)
