"""Runs that nothing can stop: hung ranks are named and ended, lost ranks come back by themselves, the clock is obeyed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from made_run import make_data
from parallel.harness import RankFailed, run_processes
from training_runs import _before_step, _train, final_hashes, log_of, tiny, train_on

from exlm_dist.config import dump_config
from exlm_dist.model import checkpoint_reader as reader
from exlm_dist.utils.errors import EXIT_DONE, EXIT_SAVED


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "prepared")


def stopped_in_a_step(rank, settings):
    _before_step(lambda step: os.kill(os.getpid(), signal.SIGSTOP) if step == 5 and rank == 1 else None)
    return _train(rank, settings, None)


def stopped_in_a_save(rank, settings):
    from exlm_dist.training.session import Session

    plain = Session.save

    def save(session, **keywords):
        if rank == 0 and session.step == 8:
            os.kill(os.getpid(), signal.SIGSTOP)
        plain(session, **keywords)

    Session.save = save
    return _train(rank, settings, None)


@pytest.mark.parametrize(
    "hang, words",
    [
        (stopped_in_a_step, ["rank 1 has stood still", "in phase step, after 5 steps (the process is stopped"]),
        (stopped_in_a_save, ["rank 0 has stood still", "in phase save, after 8 steps (the process is stopped"]),
    ],
)
def test_a_stopped_rank_ends_the_run_with_its_name_and_all_stacks(hang, words, data, tmp_path):
    config = tiny(tmp_path, "hang", data, watchdog={"step": 2, "save": 2}, launch={"timeout": 60})
    with pytest.raises(RankFailed) as caught:
        run_processes(hang, 2, config.model_dump(), timeout=60)
    assert caught.value.codes == [-signal.SIGKILL] * 2
    text = log_of(config)
    assert all(word in text for word in words) and "distributed_c10d.py" in text and "cannot show its stack" in text
    assert reader.step_of(reader.newest_checkpoint(tmp_path / "hang")) == 4


def slow_steps(rank, settings):
    _before_step(lambda step: time.sleep(0.2))
    return _train(rank, settings, None)


def test_a_run_is_saved_before_the_time_of_the_job_ends(data, tmp_path):
    config = tiny(
        tmp_path,
        "limit",
        data,
        schedule={"steps": 600},
        checkpoint={"every": 600},
        launch={"time_limit": 8 / 60, "margin": 1},
    )
    assert run_processes(slow_steps, 2, config.model_dump(), timeout=60) == [EXIT_SAVED] * 2
    state = reader.read_state(reader.newest_checkpoint(tmp_path / "limit"))
    assert 0 < state["step"] < 600


def test_a_hung_rank_of_the_command_is_replaced_and_the_bits_are_the_same(data, tmp_path):
    """`exlm pretrain` with two ranks; one is stopped after the first checkpoint. The command ends well, by itself."""
    config = tiny(
        tmp_path,
        "run",
        data,
        schedule={"steps": 150},
        checkpoint={"every": 30},
        watchdog={"step": 3},
        launch={"processes": 2},
    )
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    command = subprocess.Popen(
        [sys.executable, "-m", "exlm_dist.cli", "pretrain", str(file)], stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run/checkpoints/step-00000030/COMPLETE").exists():
            assert time.monotonic() < deadline and command.poll() is None, "no first checkpoint"
            time.sleep(0.02)
        for process in psutil.Process(command.pid).children():
            if process.environ().get("RANK") == "1":
                process.suspend()
        _, text = command.communicate(timeout=90)
    finally:
        command.kill()
        command.wait()
    assert command.returncode == EXIT_DONE, text
    assert "error: rank 1 has stood still" in text and "starting the ranks again after step" in text
    (tmp_path / "other").mkdir()
    undisturbed = config.model_copy(update={"runs": str(tmp_path / "other")})
    assert train_on(undisturbed, 2) == [EXIT_DONE] * 2
    assert final_hashes(config) == final_hashes(undisturbed)
