"""`exlm evaluate masked` as a user gives it: one table of all checkpoints, again after a kill, and what it refuses."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from made_run import MOLECULES, make_config, make_data, make_run, write_initial_checkpoint

from exlm_dist.analysis import masked_report
from exlm_dist.checkpoint.reader import read_config
from exlm_dist.cli import main
from exlm_dist.evaluation.masked_lm import evaluate_checkpoint
from exlm_dist.suites import watch
from exlm_dist.suites.cells import read_results
from exlm_dist.suites.masked_suite import MaskedRequest
from exlm_dist.suites.masked_table import Point, read_masked_table
from exlm_dist.tracking import EVENTS, read_events


@pytest.fixture
def command(runs: tuple[Path, Path], tmp_path: Path) -> list[str]:
    """An evaluation of a few seconds, into tmp_path/out."""
    return [
        *("evaluate", "masked", "--checkpoint", *map(str, runs), "--out", str(tmp_path / "out")),
        *("--ratios", "0.15", "0.4", "--sequences", "12", "--complete", "4", "--jobs", "1", "--device", "cpu"),
    ]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes longer than all else."""
    monkeypatch.setattr(masked_report, "masked_figures", lambda *_: [])


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    """What a command line that is refused says."""

    def run(arguments: list[str]) -> str:
        assert main(arguments) in (2, 77)  # 77 for data that cannot be used
        return capsys.readouterr().err

    return run


def results(out: Path) -> dict[tuple[str, str, str, int], dict[str, Any]]:
    """Of all cells, by task, checkpoint, what was masked and seed, without what differs each time."""
    found, failures = read_results(out)
    assert not failures
    return {
        (one["task"], one["method"]["label"], str(one["grid"]), one["seed"]): {**one, "seconds": 0} for one in found
    }


def test_one_table_has_all_checkpoints_at_all_ratios(
    command: list[str], runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*command, "--seeds", "2", "--tasks", "ratios", "repeated"]) == 0
    out = tmp_path / "out"
    monkeypatch.undo()
    assert main(["report", str(out)]) == 0  # with figures
    table = read_masked_table(out)
    assert [column.label for column in table.columns] == ["tiny_exlm@100", "tiny_mlm@100"]
    assert table.points == [Point("ratios", 1, 0.15), Point("ratios", 1, 0.4), Point("repeated", 1, 0.15)]
    assert len(table.results) == 2 * 2 * 2 + 2 and not table.differing and not table.failures
    sizes = table.tasks["ratios"]
    assert sizes["longest"] < max(map(len, MOLECULES)) and sizes["skipped"] > 0, "some do not fit when they expand"
    page = (out / "report" / "report.md").read_text()
    assert "data:image/png;base64" in (out / "report" / "report.html").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| 0.4 | tiny_exlm@100"))
    score = table.entries[Point("ratios", 1, 0.4), table.columns[0].key].score("nll")
    assert f"{score.mean:.4f} ± {score.sd:.4f}" in row and score.seeds == 2
    figures = ["quality_by_ratio", "calibration", "entropy", "repeated"]
    for name in figures:
        assert f"({name}.png)" in page and (out / "report" / f"{name}.png").stat().st_size > 10_000
    with open(out / "report" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and {row["checkpoint"] for row in rows} == {"tiny_exlm@100", "tiny_mlm@100"}
    whole = json.loads((out / "report" / "results.json").read_text())
    assert len(whole["results"]) == 10 and whole["suite"]["sequences"] == 12
    recorded(runs[0], table.columns[0].key, out)


def recorded(run: Path, key: str, out: Path) -> None:
    """The results are child runs of the training, and their means results of the checkpoint, which rank it."""
    events = list(read_events(run / EVENTS))
    children = [event for event in events if event["kind"] == "child_run" and event["tags"]["suite"] == "masked"]
    assert len(children) == len({event["name"] for event in children}) == 4
    assert all(len(child["tags"]["positions"]) == 64 and child["step"] == 100 for child in children)
    (judged,) = [event for event in events if event["kind"] == "checkpoint" and "masked.folder" in event["tags"]]
    assert judged["step"] == 100 and judged["tags"]["masked.folder"] == str(out.resolve())
    means = judged["values"]
    entry = read_masked_table(out).entries[Point("ratios", 1, 0.4), key]
    assert means["masked/ratios_0.4_nll"] == pytest.approx(entry.score("nll").mean)


def test_the_figures_of_a_cell_are_those_of_exlm_evaluate_run(command: list[str], tmp_path: Path) -> None:
    """The same masked tokens for both models, and the same numbers as the command for one run gives."""
    folder = tmp_path / "roomy"
    data = make_data(folder / "data")
    plain = {"states": 1, "anchors": False, "layers": 1, "width": 16, "heads": 2, "ffn": 32, "max_positions": 256}
    runs = [
        make_run(make_config(folder, "exlm", data)),
        make_run(make_config(folder, "mlm", data, "mlm", model={**plain, "objective": "mlm"})),
    ]
    start = command.index("--checkpoint")
    assert main([*command[: start + 1], *map(str, runs), *command[start + 3 :]]) == 0
    found = results(tmp_path / "out")
    for run in runs:
        known = evaluate_checkpoint(run, sequences=12, complete=4, mask_ratio=0.4, device="cpu", record=False)
        cell = found["ratios", f"{run.name}@100", "{'ratio': 0.4}", 0]
        scores = cell["scores"]["valid"]
        assert {name: scores[name] for name in known.values} == pytest.approx(known.values, rel=1e-5, abs=1e-6)
    for ratio in (0.15, 0.4):
        hashes = {one["positions"] for key, one in found.items() if str(ratio) in key[2]}
        assert len(hashes) == 1, "every checkpoint is asked for the same tokens"


def test_a_killed_evaluation_goes_on(command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "exlm_dist.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not list(out.glob("cells/*/*/*/*/seed-0.json")) and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    said = process.communicate()[0]
    before = {path: path.read_bytes() for path in out.glob("cells/*/*/*/*/seed-0.json")}
    assert 0 < len(before) < 4, said
    assert main(command) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    other = tmp_path / "other"
    assert main([*command[: command.index("--out")], "--out", str(other), *command[command.index("--ratios") :]]) == 0
    assert results(out) == results(other) and len(results(out)) == 4


def test_a_file_of_rows(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("name,molecule\n" + "".join(f"m{n},{one}\n" for n, one in enumerate(["C1CC", *MOLECULES[4:]])))
    assert main([*command, "--data", str(table), "--column", "molecule"]) == 0
    assert "1 rows cannot be used (first: row 1: " in capsys.readouterr().out
    page = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "1 of 7 rows cannot be used:" in page
    assert {tuple(one["scores"]) for one in results(tmp_path / "out").values()} == {("rows",)}


def test_each_checkpoint_of_a_training(
    command: list[str], runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "POLL", 0.05)
    config = read_config(runs[1])
    folder = tmp_path / "watched"
    run = make_run(config.model_copy(update={"runs": str(folder)}))
    write_initial_checkpoint(config, run, step=120)
    out = tmp_path / "watching"
    request = MaskedRequest((), out, watched=run, ratios=(0.3,), sequences=6, complete=2, jobs=1, device="cpu")
    summary = watch.watch_run(request, run, idle=60)
    assert summary.computed == 2
    assert sorted(one["checkpoint"]["step"] for one in results(out).values()) == [100, 120]


def test_a_model_of_repeated_tokens_has_that_task_alone(
    command: list[str], runs: tuple[Path, Path], tmp_path: Path, refused: Any
) -> None:
    config = read_config(runs[1])
    masking = config.masking.model_copy(update={"copies": 2, "ratio": 0.5})
    changed = {"masking": masking, "name": "twice", "runs": str(tmp_path)}
    changed["model"] = config.model.model_copy(update={"max_positions": 256})
    repeated = make_run(config.model_copy(update=changed))
    before, after = command[:3], command[command.index("--out") :]
    assert "repeated of plain ones" in refused([*before, str(repeated), *after])
    assert "repeated of plain ones" in refused([*before, str(runs[0]), *after, "--tasks", "repeated"])
    assert main([*before, str(repeated), str(runs[1]), *after, "--tasks", "repeated"]) == 0
    table = read_masked_table(tmp_path / "out")
    assert table.points == [Point("repeated", 1, 0.15), Point("repeated", 2, 0.5)]
    (point,) = table.points[1:]
    scores = {key: entry for key, entry in table.entries.items() if key[0] == point}
    ((_, entry),) = scores.items()
    assert 0.1 < entry.score("hidden_fraction").mean < 0.4
    once = evaluate_checkpoint(runs[1], sequences=1, mask_ratio=0.4, record=False).count
    assert evaluate_checkpoint(repeated, sequences=1, mask_ratio=0.4, record=False).count == pytest.approx(
        2 * once, abs=1
    )


def test_what_does_not_fit_is_refused(
    command: list[str], runs: tuple[Path, Path], tmp_path: Path, refused: Any
) -> None:
    assert "--ratios 1.5: must be above 0 and below 1" in refused([*command, "--ratios", "1.5"])
    assert "has no task 'ratio'" in refused([*command, "--tasks", "ratio"])
    assert "leave out `random`" in refused([*command, "--checkpoint", str(runs[0]), "random"])
    assert "--protocol is no option of the suite masked" in refused([*command, "--protocol", "quick"])
    assert "--column is of a file of rows" in refused([*command, "--column", "smiles"])
    assert "neither a folder of prepared data nor a file" in refused([*command, "--data", str(tmp_path / "nowhere")])
    assert "needs --out" in refused(command[: command.index("--out")])
    other = make_data(tmp_path / "other", extra_token="[K+]")
    assert "was prepared with another tokenizer" in refused([*command, "--data", str(other)])


def test_other_sequences_than_it_was_begun_with_are_refused(
    command: list[str], runs: tuple[Path, Path], tmp_path: Path, refused: Any
) -> None:
    first = [*command[:3], str(runs[1]), *command[command.index("--out") :]]
    assert main(first) == 0
    assert "the checkpoints takes" in refused(command), "an ExLM takes shorter sequences than the plain model did"
    assert "sequences was 12, now 13" in refused([*first, "--sequences", "13"])
    data = make_data(tmp_path / "other", extra_token="[K+]")
    config = read_config(runs[1])
    changed = config.model_copy(
        update={"data": config.data.model_copy(update={"path": str(data)}), "runs": str(tmp_path), "name": "another"}
    )
    another = make_run(changed)
    assert "give --data" in refused([*first, "--checkpoint", str(runs[1]), str(another)])
    same = [*first, "--data", str(config.data.path), "--checkpoint", str(another)]
    assert "another tokenizer than tiny_mlm@100" in refused(same)
