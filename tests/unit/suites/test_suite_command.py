"""`exlm evaluate SUITE` as a user gives it: one table of all, the same again after a kill, and what it refuses."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from made_run import make_config, make_data, write_initial_checkpoint
from molecule_table import read_table, write_table

from exlm_dist.cli import main
from exlm_dist.config import dump_config
from exlm_dist.finetuning.model_folder import read_finetuned
from exlm_dist.suites.cells import read_results
from exlm_dist.suites.methods import find_methods
from exlm_dist.suites.moleculenet import MOLECULENET
from exlm_dist.tracking import EVENTS, read_events
from exlm_dist.utils.errors import ConfigError


def scores(out: Path) -> dict[str, Any]:
    """Scores of all cells, by what they are of."""
    results, failures = read_results(out)
    assert not failures
    return {
        f"{one['task']} {one['split']} {one['method']['key']} {one['grid']} {one['seed']}": one["scores"]
        for one in results
    }


def replaced(arguments: list[str], option: str, *values: object) -> list[str]:
    """The command line with other values of an option, or with it if it was not there."""
    if option not in arguments:
        return [*arguments, option, *map(str, values)]
    start = arguments.index(option) + 1
    end = next((n for n in range(start, len(arguments)) if arguments[n].startswith("--")), len(arguments))
    return [*arguments[:start], *map(str, values), *arguments[end:]]


def result_files(out: Path) -> list[Path]:
    """Files of the cells that are computed."""
    return list((out / "cells").glob("*/*/*/*/seed-?.json"))


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """The command as a process of its own."""
    command = [sys.executable, "-m", "exlm_dist.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Any, process: subprocess.Popen[str]) -> Any:
    """What `condition` gives when it is true for the first time, while the process runs."""
    while process.poll() is None:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0])


def test_one_table_has_checkpoints_initial_weights_probes_and_fingerprints(
    arguments: list[str], tmp_path: Path, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*replaced(arguments, "--tasks", "bbbp", "esol", "sider"), "--frozen"]
    assert main(arguments) == 0
    out = tmp_path / "out"
    page = (out / "report" / "report.md").read_text()
    header = next(line for line in page.splitlines() if line.startswith("| task | metric | test rows"))
    labels = [cell.strip() for cell in header.split("|")[4:-1]]
    assert labels == [
        *("fingerprints, forest", "fingerprints, boosting"),
        *("random", "random frozen"),
        *("tiny_exlm@100", "tiny_mlm@100", "tiny_exlm@100 frozen", "tiny_mlm@100 frozen"),
    ]
    for row in ("| bbbp | roc_auc | 9 (6) |", "| sider | roc_auc |", "| esol | rmse | 6 |", "| mean of 2 | roc_auc |"):
        assert row in page
    assert "**tiny_exlm@100** against random initial weights" in page
    assert "row 4: not SMILES" in page and "targets left out as all their labels are the same: 1" in page
    assert "Not evaluated here: bace, clintox, tox21" in page
    assert {path.name for path in (out / "report").glob("*.png")} == {"split_scaffold.png"}
    with open(out / "report" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["metric"] for row in rows if row["task"] == "esol"} == {"rmse", "mae", "r2", "pearson", "spearman"}
    split = read_table(out / "splits" / "bbbp-scaffold.csv")
    assert [row["row"] for row in split] == [str(n) for n in range(1, 63) if n != 4]
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*.json")}
    assert main(arguments) == 0 and len(before) == 3 * 8 * 2
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*.json")} == before
    assert "cells: 0 computed, 48 were there before" in capsys.readouterr().out
    assert not list(out.rglob("*.partial"))
    recorded(runs[0])


def recorded(run: Path) -> None:
    """The results are child runs of the training, once each, and their means its metrics."""
    events = list(read_events(run / EVENTS))
    children = [  # the run serves tests of other suites too
        event for event in events if event["kind"] == "child_run" and event["name"].startswith("moleculenet-")
    ]
    assert len(children) == len({event["name"] for event in children}) == 3 * 2 * 2
    assert {event["step"] for event in children} == {100}
    tags = children[0]["tags"]
    assert tags["suite"] == "moleculenet" and tags["task"] == "bbbp" and tags["budget"] == "unit-test"
    assert len(tags["checkpoint.sha256"]) == len(tags["split.hash"]) == 64
    judged, probe = [e for e in events if e["kind"] == "checkpoint" and "moleculenet.protocol" in e["tags"]]
    means = judged["values"]
    assert all("_frozen_" in name for name in probe["values"]) and not any("_frozen_" in name for name in means)
    assert judged["step"] == 100 and judged["tags"]["moleculenet.protocol"] == "unimol"
    assert len(judged["tags"]["moleculenet.split.bbbp_scaffold"]) == 12
    own = [
        child["values"]["moleculenet/test_rmse"]
        for child in children
        if child["name"].startswith("moleculenet-esol-scaffold-seed")
    ]
    assert means["moleculenet/esol_scaffold_test_rmse"] == pytest.approx(sum(own) / 2) and len(own) == 2


def test_a_cell_has_the_scores_that_exlm_finetune_gives(
    arguments: list[str], runs: tuple[Path, Path], moleculenet: Path, tmp_path: Path
) -> None:
    """The one routine: the same rows, split, settings and seed give the same model, bit by bit."""
    assert main(replaced(arguments, "--checkpoint", runs[0])) == 0
    part = {row["row"]: row["part"] for row in read_table(tmp_path / "out" / "splits" / "bbbp-scaffold.csv")}
    rows = [
        {**row, "part": part[str(number)]}
        for number, row in enumerate(read_table(moleculenet / "BBBP.csv"), 1)
        if str(number) in part
    ]
    table = write_table(tmp_path / "table.csv", rows)
    own = ["--epochs", "1", "--batch", "16", "--lr", "0.01", "--weight-decay", "0", "--dropout", "0", "--no-mlflow"]
    finetune = ["finetune", str(table), "--target", "p_np", "--checkpoint", str(runs[0]), "--out", str(tmp_path / "m")]
    assert main([*finetune, "--split", "column", "part", "--seeds", "2", "--device", "cpu", *own]) == 0
    members = read_finetuned(tmp_path / "m")["members"]
    results = sorted(read_results(tmp_path / "out")[0], key=lambda one: one["seed"])
    assert [one["scores"] for one in results] == [{name: one[name] for name in ("valid", "test")} for one in members]


def test_splits_of_the_same_rows_are_computed_once(
    arguments: list[str], runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without stereocentres both kinds of scaffolds give one split; `random` is another."""
    arguments = replaced(arguments, "--splits", "scaffold", "scaffold-chiral", "random")
    assert main(replaced(arguments, "--checkpoint", runs[0], "fingerprints")) == 0
    results, failures = read_results(tmp_path / "out")
    twins = [one for one in results if one["split"] == "scaffold-chiral"]
    assert len(results) == 3 * 6 and not failures and len(twins) == 6
    for result in results:
        assert result.get("same_rows_as") == ("scaffold" if result in twins else None)
    for twin in twins:
        own = {name: value for name, value in twin.items() if name != "same_rows_as"}
        assert {**own, "split": "scaffold"} in results
    said = [line for line in capsys.readouterr().out.splitlines() if "the same rows as scaffold" in line]
    assert len(said) == 6 and all("scaffold-chiral" in line for line in said)


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_scores(
    arguments: list[str], runs: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = replaced(arguments, "--checkpoint", *runs, "random")
    process = start(replaced(arguments, "--jobs", 2))
    wait_for(lambda: result_files(out), process)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    psutil.wait_procs(workers, timeout=60)
    assert not any(worker.is_running() for worker in workers), "they end with the process that they work for"
    before = {path: path.read_bytes() for path in result_files(out)}
    assert len(before) < 6
    assert main(arguments) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    assert main(replaced(arguments, "--out", tmp_path / "other")) == 0
    assert scores(out) == scores(tmp_path / "other") and len(scores(out)) == 6


def test_a_worker_that_dies_costs_its_own_cell_alone(
    arguments: list[str], runs: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = replaced(replaced(arguments, "--checkpoint", runs[1]), "--grid", "epochs=20", "patience=0")
    process = start(replaced(arguments, "--jobs", 2))

    def working() -> list[psutil.Process]:
        spawned = [one for one in psutil.Process(process.pid).children() if "spawn_main" in " ".join(one.cmdline())]
        return spawned if len(list((out / "cells").glob("*/*/*/*/*.partial"))) == 2 else []

    wait_for(working, process)[0].kill()
    said = process.communicate()[0]
    assert process.returncode == 78, said
    results, failures = read_results(out)
    assert len(failures) == 1 and len(results) == 1, said
    assert "was killed (for memory?" in failures[0]["reason"] and "its process was killed" in said
    assert "## Failed" in (out / "report" / "report.md").read_text()
    assert main(arguments) == 0, "a failed cell is tried again"
    assert len(scores(out)) == 2 and not list(out.rglob("*.failed.json"))


def test_an_interrupted_evaluation_says_that_it_goes_on(
    arguments: list[str], runs: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = replaced(replaced(arguments, "--checkpoint", runs[1]), "--grid", "epochs=500", "patience=0")
    process = start(arguments)
    wait_for(lambda: list((tmp_path / "out" / "cells").glob("*/*/*/*/*.partial")), process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 75 and "the same command goes on with what is missing" in said


def test_a_task_that_fails_is_recorded_and_the_others_go_on(
    arguments: list[str], runs: tuple[Path, Path], moleculenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "BBBP.csv").write_bytes((moleculenet / "BBBP.csv").read_bytes())
    (data / "bace.csv").write_text("mol,CID,Model\nCC,1,Train\n")
    arguments = replaced(replaced(arguments, "--data", data), "--checkpoint", runs[1])
    arguments = replaced(arguments, "--tasks", "bbbp", "bace")
    assert main(arguments) == 78
    said = capsys.readouterr().out
    assert "has no column 'Class', whose values bace is to predict" in said and "1 failed" in said
    results, failures = read_results(tmp_path / "out")
    assert {one["task"] for one in results} == {"bbbp"} and {one["task"] for one in failures} == {"bace"}
    assert "bace scaffold tiny_mlm@100 seed 0" in (tmp_path / "out" / "report" / "report.md").read_text()


def test_missing_sets_are_skipped_and_named_unless_they_are_asked_for(
    arguments: list[str], moleculenet: Path, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = replaced(replaced(arguments, "--checkpoint", runs[0]), "--seeds", 1)
    assert main(replaced(arguments, "--tasks", "bbbp", "tox21")) == 77
    assert f"{moleculenet}: has no file for tox21 (looked for tox21.csv" in capsys.readouterr().err
    without = arguments.index("--tasks")
    assert main([*arguments[:without], *arguments[without + 2 :]]) == 0
    assert "bace, clintox, tox21, toxcast, muv, hiv, freesolv, lipophilicity (8 of 11 tasks)" in capsys.readouterr().out


def test_the_best_point_of_a_grid_is_chosen_on_the_validation_part(
    arguments: list[str], runs: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = replaced(replaced(arguments, "--checkpoint", runs[0]), "--tasks", "esol")
    assert main(replaced(arguments, "--grid", "epochs=1", "lr=1e-5,0.02", "batch=16")) == 0
    results, _ = read_results(tmp_path / "out")
    assert sorted({one["grid"]["lr"] for one in results}) == [1e-5, 0.02] and len(results) == 4
    points = {lr: [one["scores"]["valid"]["rmse"] for one in results if one["grid"]["lr"] == lr] for lr in (1e-5, 0.02)}
    best = min(points, key=lambda lr: sum(points[lr]))
    row = next(row for row in read_table(tmp_path / "out" / "report" / "results.csv") if row["part"] == "test")
    assert f"lr={best}" in row["grid"]
    shown = [one["scores"]["test"]["rmse"] for one in results if one["grid"]["lr"] == best]
    assert float(row["mean"]) == pytest.approx(sum(shown) / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--grid", "epoch=1"), "no setting 'epoch' (did you mean 'epochs'?)"),
        (("--grid", "epochs=many"), "'many' is not a whole number"),
        (("--grid", "epochs"), "must be NAME=VALUE"),
        (("--grid", "lr=2"), "lr = 2.0"),
        (("--grid", "frozen=true"), "there is no setting 'frozen'"),
        (("--checkpoint", "random"), "give a checkpoint with its shape too"),
        (("--tasks", "qm9"), "no task 'qm9'"),
        (("--sequences", "5"), "--sequences is no option of the suite moleculenet"),
        (("--idle", "5"), "--idle is of a training that is watched"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(
    arguments: list[str], change: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(replaced(arguments, change[0], *change[1:])) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("seed-*.json"))


def test_a_folder_is_of_one_evaluation(
    arguments: list[str], runs: tuple[Path, Path], moleculenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = replaced(replaced(arguments, "--checkpoint", "fingerprints"), "--seeds", 1)
    assert main(arguments) == 0
    assert main(replaced(arguments, "--grid", "epochs=2")) == 2
    assert "was begun with other settings (grid was" in capsys.readouterr().err
    other = tmp_path / "data"
    other.mkdir()
    (other / "bbbp.csv").write_text((moleculenet / "BBBP.csv").read_text().replace("broken", "other"))
    assert main(replaced(arguments, "--data", other)) == 2
    assert "was begun with another file for bbbp" in capsys.readouterr().err
    assert main(replaced(arguments, "--out", runs[0])) == 2
    assert "is not the folder of an evaluation" in capsys.readouterr().err
    (tmp_path / "out" / "cells" / "bbbp").rename(tmp_path / "out" / "cells" / "gone")
    path = next((tmp_path / "out" / "cells").rglob("seed-0.json"))
    path.write_text("{")
    assert main(["report", str(tmp_path / "out")]) == 78
    assert "is damaged" in capsys.readouterr().err


def test_checkpoints_of_another_domain_and_options_of_the_other_form_are_refused(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(runs[0]), "--tasks", "bbbp"]) == 2
    assert "is no suite (moleculenet, " in capsys.readouterr().err
    assert main(["evaluate", "moleculenet", "--data", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "needs --checkpoint, or --watch" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="names nothing"):
        find_methods([], MOLECULENET, frozen=False)
    of_texts = replace(MOLECULENET, domain="text")
    with pytest.raises(ConfigError, match="reads molecules, but the suite moleculenet has texts"):
        find_methods([str(runs[0])], of_texts, frozen=False)
    with pytest.raises(ConfigError, match="fingerprints is a baseline of the suite moleculenet, not of squad"):
        find_methods(["fingerprints"], replace(of_texts, name="squad", baselines=()), frozen=False)


def test_checkpoints_are_told_apart_by_their_weights(runs: tuple[Path, Path], tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", extra_token="[K+]")
    config = make_config(tmp_path / "elsewhere", "tiny_exlm", data)
    run = tmp_path / "elsewhere" / "tiny_exlm"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(config))
    write_initial_checkpoint(config, run)
    first, second, again = str(runs[0]), str(run), str(runs[0] / "checkpoints" / "step-00000100")
    methods = find_methods([first, second, again, "random"], MOLECULENET, frozen=False)
    assert [method.label for method in methods[:2]] == ["tiny_exlm@100"] * 2 and len(methods) == 4
    assert len({method.key for method in methods}) == 4
    (head,) = find_methods([first], MOLECULENET, frozen_only=True)
    assert head.label == "tiny_exlm@100 frozen" and head.frozen and head.trained
    assert json.loads(json.dumps(methods[0].facts))["run"] == first
