"""Who may write a run folder, and what it says of the run when a launch begins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from made_run import make_config

from exlm_dist.config import load_config
from exlm_dist.tracking import EVENTS, EventLog, read_events
from exlm_dist.training.run_folder import RunFolder, record_start
from exlm_dist.utils.checkpoint_names import newest_step
from exlm_dist.utils.errors import CheckpointError


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path / "runs", "one", tmp_path / "data")


@pytest.fixture
def begun(config) -> Path:
    """A run folder whose log has steps 1 to 6."""
    folder = RunFolder.open(config)
    folder.close()
    record_start(folder.path, config, 0)
    log = EventLog(folder.path / EVENTS)
    for step in range(1, 7):
        log.metrics(step, {"train/loss": float(step)})
    log.close()
    return folder.path


def logged(folder: Path) -> list[int]:
    return [event["step"] for event in read_events(folder / EVENTS) if event["kind"] == "metrics"]


def uid(folder: Path) -> str:
    return next(read_events(folder / EVENTS))["uid"]


def test_the_folder_has_the_settings_of_the_newest_launch(config, begun):
    assert (begun / "checkpoints").is_dir() and load_config(begun / "config.yaml") == config
    changed = config.model_copy(update={"parallel": config.parallel.model_copy(update={"zero": 3})})
    record_start(begun, changed, 6)
    assert load_config(begun / "config.yaml") == changed and logged(begun) == [1, 2, 3, 4, 5, 6]


def test_of_the_log_only_the_steps_done_stand(config, begun):
    before = uid(begun)
    record_start(begun, config, 4)
    assert logged(begun) == [1, 2, 3, 4]
    record_start(begun, config, 0)
    assert logged(begun) == [] and uid(begun) == before


@pytest.mark.parametrize("there", ["other settings", "name: cut sh", None])
def test_a_start_that_came_to_nothing_binds_nothing(config, begun, there):
    """Other settings, or none that can be read: another run, in the same folder."""
    before, file = uid(begun), begun / "config.yaml"
    if there is None:
        file.unlink()
    elif there != "other settings":
        file.write_text(there)
    changed = config.model_copy(update={"seed": 3, "model": config.model.model_copy(update={"width": 32})})
    record_start(begun, changed, 0)
    assert load_config(file) == changed and logged(begun) == [] and uid(begun) != before


def test_newer_checkpoints_which_were_rejected_are_set_aside(config, begun):
    for name in ("step-00000002", "step-00000004", "step-00000006", "rejected-step-00000006/old"):
        (begun / "checkpoints" / name).mkdir(parents=True)
    record_start(begun, config, 4)
    names = sorted(path.name for path in (begun / "checkpoints").iterdir())
    assert names == ["rejected-step-00000006", "step-00000002", "step-00000004"]
    assert newest_step(begun) == 0 and not (begun / "checkpoints/rejected-step-00000006/old").exists()


def test_a_second_writer_is_refused_until_the_first_is_gone(config):
    first = RunFolder.open(config)
    with pytest.raises(CheckpointError, match=f"another process .*{os.getpid()}"):
        RunFolder.open(config, patience=0.2)
    first.close()
    RunFolder.open(config, patience=0.2).close()


def test_a_killed_writer_blocks_nobody(config, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from exlm_dist.training.run_folder import _lock;"
        "_lock(Path(sys.argv[1]), 1.0); print('locked', flush=True); time.sleep(60)"
    )
    RunFolder.open(config).close()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "runs/one")], stdout=subprocess.PIPE, env=environment
    )
    try:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(CheckpointError):
            RunFolder.open(config, patience=0.2)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
    RunFolder.open(config, patience=2.0).close()


def test_a_folder_that_cannot_be_made(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be made"):
        RunFolder.open(config.model_copy(update={"runs": str(tmp_path / "file")}))
