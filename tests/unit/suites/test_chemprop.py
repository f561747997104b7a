"""chemprop as a program of another environment: a stand-in takes its place, which says what it was given."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from molecule_table import read_table

from exlm_dist.cli import main
from exlm_dist.finetuning.metrics import evaluate_predictions
from exlm_dist.finetuning.targets import Target
from exlm_dist.suites.cells import read_results

#: Keeps its arguments beside itself, and predicts the length of a molecule, of the second target half of that.
STAND_IN = """#!{python}
import csv, json, os, pathlib, sys
given = dict(zip(sys.argv, sys.argv[1:]))
with open(__file__ + ".log", "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
if {fails!r} == sys.argv[1]:
    print("RuntimeError: no such thing", file=sys.stderr)
    sys.exit(3)
assert "PYTHONPATH" not in os.environ
if sys.argv[1] == "train":
    path = pathlib.Path(given["--output-dir"]) / "model_0" / "best.pt"
    path.parent.mkdir(parents=True)
    path.touch()
    pathlib.Path(__file__ + ".csv").write_bytes(pathlib.Path(given["--data-path"]).read_bytes())
else:
    assert pathlib.Path(given["--model-paths"]).exists()
    rows = list(csv.DictReader(open(given["--test-path"])))
    names = [name for name in rows[0] if name.startswith("target_")]
    with open(given["--preds-path"], "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["smiles", *names])
        for row in rows[{skipped}:]:
            writer.writerow([row["smiles"], *(len(row["smiles"]) / 100 / (1 + n) for n in range(len(names)))])
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return made(tmp_path / "chemprop")


def made(path: Path, fails: str = "", skipped: int = 0) -> Path:
    path.write_text(STAND_IN.format(python=sys.executable, fails=fails, skipped=skipped))
    path.chmod(0o755)
    return path


def arguments(data: Path, out: Path, *more: object) -> list[str]:
    command = ["evaluate", "moleculenet", "--checkpoint", "chemprop", "--data", data, "--out", out, "--jobs", "1"]
    return [*map(str, (*command, "--splits", "scaffold", "--device", "cpu", *more))]


def test_it_has_the_rows_of_the_split_and_its_predictions_are_scored_as_all_are(
    program: Path, moleculenet: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(arguments(moleculenet, out, "--tasks", "sider", "--seeds", "2", "--chemprop", program)) == 0
    given = read_table(Path(f"{program}.csv"))
    split = read_table(out / "splits" / "sider-scaffold.csv")
    parts = {row["smiles"]: {"valid": "val"}.get(row["part"], row["part"]) for row in split}
    assert {row["smiles"]: row["part"] for row in given} == parts
    labels = {row["smiles"]: row for row in read_table(moleculenet / "sider.csv")}
    assert [(row["target_0"], row["target_1"]) for row in given] == [
        (f"{float(labels[row['smiles']]['first'])}", known and f"{float(known)}")
        for row in given
        for known in [labels[row["smiles"]]["second"]]
    ]
    train, predict, again, _ = (json.loads(line) for line in Path(f"{program}.log").read_text().splitlines())
    assert (train[0], predict[0]) == ("train", "predict") and train[train.index("--task-type") + 1] == "classification"
    assert [one[one.index("--pytorch-seed") + 1] for one in (train, again)] == ["0", "1"]
    assert train[train.index("--epochs") + 1] == "80", "those of the protocol of the set"
    results, failures = read_results(out)
    assert len(results) == 2 and not failures and results[0]["checkpoint"]["program"] == str(program)
    rows = [row for row in given if row["part"] == "test"]
    known = np.array([[float(row[f"target_{n}"] or "nan") for n in (0, 1)] for row in rows])
    predicted = np.array([[len(row["smiles"]) / 100, len(row["smiles"]) / 200] for row in rows])
    targets = [Target(name, "binary", ("0", "1")) for name in ("first", "second")]
    expected = evaluate_predictions(predicted, known, targets)["roc_auc"]
    assert results[0]["scores"]["test"]["roc_auc"] == pytest.approx(expected)
    page = (out / "report" / "report.md").read_text()
    assert "| task | metric | test rows | chemprop |" in page and "## Failed" not in page


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"fails": "train"}, "train ended with exit code 3; .* ends with: RuntimeError: no such thing"),
        ({"skipped": 1}, r"predicted.csv: has 59 rows for 60 molecules"),
    ],
)
def test_what_fails_costs_its_own_cell(wrong: dict[str, Any], said: str, moleculenet: Path, tmp_path: Path) -> None:
    program, out = made(tmp_path / "chemprop", **wrong), tmp_path / "out"
    more = ("--tasks", "esol", "--seeds", "1", "--chemprop", program)
    command = [*arguments(moleculenet, out, *more), "--checkpoint", "chemprop", "fingerprints"]
    assert main(command) == 78
    results, (failure,) = read_results(out)
    assert {one["method"]["kind"] for one in results} == {"forest", "boosting"}
    assert re.search(said, failure["reason"])
    made(program)
    assert main(command) == 0, "it is tried again"


def test_without_it_the_remedy_is_said_at_once(
    moleculenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(arguments(moleculenet, tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert "chemprop is not on the PATH" in said and "chemprop/bin/pip install chemprop\n" in said
    assert main(arguments(moleculenet, tmp_path / "out", "--chemprop", tmp_path / "absent")) == 2
    assert "--chemprop: " in capsys.readouterr().err
    made(tmp_path / "chemprop")
    assert main(arguments(moleculenet, tmp_path / "out", "--tasks", "esol", "--seeds", "1")) == 0, "found on the PATH"
    capsys.readouterr()
    command = arguments(moleculenet, tmp_path / "out", "--chemprop", tmp_path / "chemprop")
    assert main([*command, "--checkpoint", "fingerprints"]) == 2
    assert "give chemprop to --checkpoint too" in capsys.readouterr().err
