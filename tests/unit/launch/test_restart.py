"""Lost ranks are restarted at once, but not for ever."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from exlm_dist.launch import local
from exlm_dist.launch.restart import Restarts
from exlm_dist.utils.checkpoint_names import newest_step
from exlm_dist.utils.errors import EXIT_DATA, EXIT_DONE, EXIT_RETRY, EXIT_SAVED, EXIT_STOP, EXIT_USAGE


def checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "COMPLETE").touch()


def test_newest_step_counts_complete_checkpoints_only(tmp_path):
    assert newest_step(tmp_path) == 0
    checkpoint(tmp_path, 8)
    checkpoint(tmp_path, 12)
    (tmp_path / "checkpoints" / "step-00000016").mkdir()
    (tmp_path / "checkpoints" / ".tmp-step-00000020-1").mkdir()
    assert newest_step(tmp_path) == 12


@pytest.mark.parametrize("code", [EXIT_DONE, EXIT_USAGE, EXIT_SAVED, EXIT_DATA, EXIT_STOP, 1])
def test_other_exit_codes_are_final(code, tmp_path):
    assert Restarts(tmp_path, 3).next_code(code) == code


@pytest.mark.parametrize("code", [EXIT_RETRY, -9, -11, 137, 247])
def test_without_progress_it_ends_with_78(code, tmp_path):
    checkpoint(tmp_path, 4)
    restarts = Restarts(tmp_path, 2, 4)
    assert [restarts.next_code(code) for _ in range(3)] == [None, None, EXIT_STOP]


def test_progress_resets_the_count(tmp_path):
    restarts = Restarts(tmp_path, 1)
    for step in (4, 8, 12):
        assert restarts.next_code(-9) is None
        checkpoint(tmp_path, step)
    assert restarts.next_code(-9) is None and restarts.next_code(-9) == EXIT_STOP


def test_restarts_switched_off(tmp_path):
    assert Restarts(tmp_path, 0).next_code(-9) == EXIT_RETRY


def test_the_supervisor_restarts_the_ranks_and_stops_without_progress(tmp_path, monkeypatch, caplog):
    """Ranks that leave a checkpoint in their second launch and are killed in every one."""
    code = f"""
import os, pathlib
log = pathlib.Path({str(tmp_path)!r}, 'launches')
if os.environ['RANK'] == '0': log.open('a').write(os.environ['MASTER_PORT'] + ' ')
if os.environ['RANK'] == '0' and len(log.read_text().split()) == 2:
    folder = pathlib.Path({str(tmp_path)!r}, 'checkpoints/step-00000004'); folder.mkdir(parents=True)
    (folder / 'COMPLETE').touch()
if os.environ['RANK'] == '1':
    import time; time.sleep(0.3); os.kill(os.getpid(), 9)"""
    logging.getLogger("exlm_dist").addHandler(caplog.handler)
    monkeypatch.setattr(local, "RANK_COMMAND", [sys.executable, "-c", code])
    assert local.run_local([], 2, Restarts(tmp_path, 2), grace=1.0) == EXIT_STOP
    assert len((tmp_path / "launches").read_text().split()) == 4
    assert "2 restarts (launch.restarts) since the checkpoint of step 4" in caplog.text
