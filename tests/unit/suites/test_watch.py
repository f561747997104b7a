"""Checkpoints evaluated as they land: of a training that has ended, that goes on, that falls silent."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from threading import Thread

import pytest

from exlm_dist.checkpoint.reader import read_config
from exlm_dist.suites import watch
from exlm_dist.suites.cells import read_results
from exlm_dist.suites.evaluate_suite import SuiteRequest
from exlm_dist.tracking import EVENTS, EventLog
from exlm_dist.utils.errors import CheckpointError, ConfigError


@pytest.fixture
def run(runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of its own for each test, with one checkpoint."""
    monkeypatch.setattr(watch, "POLL", 0.05)
    return shutil.copytree(runs[0], tmp_path / "watched")


def request(moleculenet: Path, out: Path) -> SuiteRequest:
    grid = ("epochs=1", "lr=0.01", "batch=16")
    return SuiteRequest(
        "moleculenet", (), moleculenet, out, ("bbbp",), ("scaffold",), None, grid, 1, jobs=1, device="cpu"
    )


def add_checkpoint(run: Path, step: int) -> Path:
    """Another checkpoint with the same weights."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    aside = shutil.copytree(run / "checkpoints" / "step-00000100", run / "checkpoints" / "aside")
    aside.rename(folder)
    return folder


def test_a_run_that_has_ended_is_evaluated_to_its_last_checkpoint(run: Path, moleculenet: Path, tmp_path: Path) -> None:
    add_checkpoint(run, 120)
    (run / "checkpoints" / "step-00000130").mkdir()  # not whole
    calls = []
    out = tmp_path / "out"
    summary = watch.watch_run(request(moleculenet, out), run, idle=60, after_each=lambda: calls.append(1))
    assert summary.computed == 2 and len(calls) == 2 and not (out / watch.PINNED).exists()
    results, _ = read_results(out)
    assert sorted(one["checkpoint"]["step"] for one in results) == [100, 120]
    assert {one["checkpoint"]["run"] for one in results} == {str(run)}
    assert watch.watch_run(request(moleculenet, out), run, idle=60).present == 2


def test_new_checkpoints_are_evaluated_also_when_the_training_removes_them(
    run: Path, moleculenet: Path, tmp_path: Path
) -> None:
    log = EventLog(run / EVENTS)
    log.status("RUNNING")
    out = tmp_path / "out"

    def train() -> None:
        while not list((out / "cells").glob("*/*/*/*/*.json")):
            time.sleep(0.02)
        folder = add_checkpoint(run, 200)
        while not (out / watch.PINNED / folder.name).exists():
            time.sleep(0.005)
        time.sleep(0.05)
        shutil.rmtree(folder)
        log.status("FINISHED")

    thread = Thread(target=train)
    thread.start()
    summary = watch.watch_run(request(moleculenet, out), run, idle=120)
    thread.join()
    assert summary.failed == 0
    assert sorted(one["checkpoint"]["step"] for one in read_results(out)[0]) == [100, 200]


def test_a_training_that_falls_silent_is_not_waited_for(run: Path, moleculenet: Path, tmp_path: Path) -> None:
    EventLog(run / EVENTS).status("RUNNING")
    os.utime(run / EVENTS, (time.time() - 600,) * 2)
    said: list[str] = []
    watch.watch_run(request(moleculenet, tmp_path / "out"), run, idle=60, say=said.append)
    assert "the training has logged nothing for 10 minutes; checkpoints evaluated: 1" in said[-1]


def test_what_cannot_be_watched_is_refused(run: Path, moleculenet: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="is no run folder"):
        watch.watch_run(request(moleculenet, out), tmp_path, idle=60)
    watch.open_evaluation(request(moleculenet, out))
    with watch._pins(out), pytest.raises(ConfigError, match="another process watches a training for it"):
        watch.watch_run(request(moleculenet, out), run, idle=60)
    assert read_config(run).name == "tiny_exlm"
