"""Who may write a run folder, and what may be continued."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from made_run import make_config

from exlm_dist.training.run_folder import RunFolder
from exlm_dist.utils.errors import CheckpointError


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path / "runs", "one", tmp_path / "data")


def test_the_same_settings_continue_and_where_and_how_fast_may_change(config):
    folder = RunFolder.open(config)
    assert (folder.path / "checkpoints").is_dir() and "one" in (folder.path / "config.yaml").read_text()
    folder.close()
    changed = config.model_copy(update={"parallel": config.parallel.model_copy(update={"zero": 3})})
    RunFolder.open(changed).close()
    assert "zero: 3" in (folder.path / "config.yaml").read_text()


def test_what_is_computed_may_not(config):
    RunFolder.open(config).close()
    changed = config.model_copy(update={"seed": 3, "model": config.model.model_copy(update={"width": 32})})
    with pytest.raises(CheckpointError) as caught:
        RunFolder.open(changed)
    lines = str(caught.value).splitlines()
    assert any(line.split() == ["seed", "0", "3"] for line in lines) and any(
        line.split() == ["model.width", "16", "32"] for line in lines
    )
    RunFolder.open(config).close()  # the refused launch has let go of the lock


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
