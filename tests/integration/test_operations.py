"""Runs that nothing can stop: hung ranks are named and killed, lost ranks restarted, time limits met."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from made_run import make_data, write_initial_checkpoint
from parallel.harness import RankFailed, on_ranks, run_processes
from training_runs import _before_step, _train, final_hashes, log_of, tiny, train_on

from exlm_dist.checkpoint import reader
from exlm_dist.config import dump_config
from exlm_dist.utils.checkpoint_names import newest_step
from exlm_dist.utils.errors import EXIT_DONE, EXIT_SAVED


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "prepared")


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """A run that nothing interrupted."""
    config = tiny(tmp_path_factory.mktemp("undisturbed"), "run", data)
    assert train_on(config, 2) == [EXIT_DONE] * 2
    return config


def stopped_in_a_step(rank, settings):
    _before_step(lambda step: os.kill(os.getpid(), signal.SIGSTOP) if step == 5 and rank == 1 else None)
    return _train(rank, settings, None)


def stopped_in_a_save(rank, settings):
    from exlm_dist.training.checkpointer import Checkpointer

    plain = Checkpointer.save

    def save(checkpointer, step, evaluation, **keywords):
        if rank == 0 and step == 8:
            os.kill(os.getpid(), signal.SIGSTOP)
        plain(checkpointer, step, evaluation, **keywords)

    Checkpointer.save = save
    return _train(rank, settings, None)


@pytest.mark.parametrize(
    "hang, words",
    [
        (stopped_in_a_step, ["rank 1 has hung", "in phase step, after 5 steps (the process is stopped"]),
        (stopped_in_a_save, ["rank 0 has hung", "in phase save, after 8 steps (the process is stopped"]),
    ],
)
def test_a_stopped_rank_ends_the_run_with_its_name_and_all_stacks(hang, words, data, tmp_path):
    config = tiny(tmp_path, "hang", data, watchdog={"step": 2, "save": 2}, launch={"timeout": 60})
    with pytest.raises(RankFailed) as caught:
        run_processes(hang, 2, config.model_dump(), timeout=60)
    assert caught.value.codes == [-signal.SIGKILL] * 2
    text = log_of(config)
    assert all(word in text for word in words) and "distributed_c10d.py" in text and "cannot show its stack" in text


def stopped_after_its_training(rank, settings):
    code = _train(rank, settings, None)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return code


def test_a_rank_that_is_stopped_on_its_way_out_is_ended_too(data, tmp_path):
    config = tiny(tmp_path, "out", data, watchdog={"end": 2})
    with pytest.raises(RankFailed) as caught:
        run_processes(stopped_after_its_training, 2, config.model_dump(), timeout=60)
    assert caught.value.codes == [0, -signal.SIGKILL]
    assert "rank 1 has hung" in log_of(config) and "in phase end" in log_of(config)


def signals_in_a_save(rank, settings):
    """USR1 when the save of step 8 begins, TERM while tensors are copied, TERM again when it has been handed over."""
    from exlm_dist.training.checkpointer import Checkpointer
    from exlm_dist.training.engine import state as checkpoint

    save, copy_out, saved = Checkpointer.save, checkpoint.copy_out, []

    def signalled_save(checkpointer, step, evaluation, **keywords):
        saved.append(step)
        if rank == 1 and step == 8:
            os.kill(os.getpid(), signal.SIGUSR1)
        save(checkpointer, step, evaluation, **keywords)
        if rank == 1 and step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    def signalled_copy(*arguments):
        if rank == 1 and saved[-1] == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return copy_out(*arguments)

    Checkpointer.save, checkpoint.copy_out = signalled_save, signalled_copy
    code = _train(rank, settings, None)
    return code, saved


def test_signals_in_the_middle_of_a_save(data, undisturbed, tmp_path):
    config = tiny(tmp_path, "signals", data)
    assert run_processes(signals_in_a_save, 2, config.model_dump(), timeout=60) == [(EXIT_SAVED, [4, 8, 9])] * 2
    assert reader.step_of(reader.newest_checkpoint(tmp_path / "signals")) == 9
    assert train_on(config, 2) == [EXIT_DONE] * 2
    assert final_hashes(config) == final_hashes(undisturbed)


@pytest.mark.parametrize("content", ["", "step-00000199\n", "\0garbage"])
def test_the_pointer_to_the_latest_checkpoint_is_never_followed(content, data, tmp_path):
    config = tiny(tmp_path, "pointer", data)
    (tmp_path / "pointer").mkdir()
    folder = write_initial_checkpoint(config, tmp_path / "pointer")
    (folder.parent / "latest").write_text(content)
    assert reader.newest_checkpoint(tmp_path / "pointer") == folder and newest_step(tmp_path / "pointer") == 100


def chosen(process, folders):
    from exlm_dist.training.starting_point import select_checkpoint

    found = select_checkpoint(Path(folders[process.rank]), process)
    return found[0].name, found[1]["step"]


def test_ranks_that_see_different_checkpoints_take_the_same_one(undisturbed, tmp_path):
    """As on file systems of their own: rank 1 lacks the newest."""
    whole, other = Path(undisturbed.runs) / "run", tmp_path / "other"
    shutil.copytree(whole, other)
    shutil.rmtree(other / "checkpoints/step-00000012")
    assert on_ranks(chosen, 2, [str(whole), str(other)]) == [("step-00000008", 8)] * 2


def count_files(rank, settings):
    counts = {}
    _before_step(lambda step: counts.setdefault(step, len(os.listdir("/proc/self/fd"))))
    return _train(rank, settings, None), counts


def test_open_files_do_not_grow_with_the_steps(data, tmp_path):
    config = tiny(tmp_path, "files", data, schedule={"steps": 60})
    ((ended, counts),) = run_processes(count_files, 1, config.model_dump(), timeout=60)
    assert ended == EXIT_DONE and max(counts[step] for step in range(50, 60)) <= max(counts[step] for step in range(10))


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
    """`exlm pretrain` with two ranks, one stopped after the first checkpoint. The command succeeds by itself."""
    config = tiny(
        tmp_path,
        "run",
        data,
        schedule={"steps": 80},
        checkpoint={"every": 16},
        watchdog={"step": 3, "save": 3, "evaluation": 3},  # whatever it is doing when it is stopped
        launch={"processes": 2},
    )
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    command = subprocess.Popen(
        [sys.executable, "-m", "exlm_dist.cli", "pretrain", str(file)], stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run/checkpoints/step-00000016/COMPLETE").exists():
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
    assert "error: rank 1 has hung" in text and "restarting the ranks after step" in text
    (tmp_path / "other").mkdir()
    undisturbed = config.model_copy(update={"runs": str(tmp_path / "other")})
    assert train_on(undisturbed, 2) == [EXIT_DONE] * 2
    assert final_hashes(config) == final_hashes(undisturbed)
