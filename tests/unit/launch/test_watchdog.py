"""The watchdog ends a job that hangs, names the rank and logs the stacks; the ranks are a few lines of Python."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exlm_dist.launch import heartbeat, watchdog
from exlm_dist.launch.local import rank_environments, supervise
from exlm_dist.utils.errors import EXIT_RETRY

#: A rank of a job: beats every 50 ms; `step` limit 1 s, all others none.
RANK = """
import os, signal, sys, time, ctypes
from exlm_dist.config.schema import WatchdogConfig
from exlm_dist.launch import heartbeat
rank = int(os.environ['RANK'])
heartbeat.start(WatchdogConfig(start=0, step=1, save=2, evaluation=0, end=0), 'test')
def beats(number):
    for step in range(number):
        heartbeat.beat(step + 1)
        time.sleep(0.05)
"""


def run(tmp_path: Path, code: str, ranks: int = 3, first: str = "") -> int:
    environments = rank_environments(ranks, tmp_path)
    folder = tmp_path / "tmp"
    folder.mkdir(exist_ok=True)
    return supervise(
        [sys.executable, "-c", "import os\n" + first + RANK + code],
        [{**environment, "TMPDIR": str(folder)} for environment in environments],
        grace=5.0,
    )


def wait_until_clean(tmp_path: Path) -> None:
    """Wait until no watchdog and none of its files are left."""
    deadline = time.monotonic() + 20
    while list((tmp_path / "tmp").iterdir()):
        assert time.monotonic() < deadline, "files of the watchdog are left"
        time.sleep(0.1)


@pytest.mark.parametrize("moment", ["before its watchdog starts", "after"])
def test_whichever_rank_is_killed_at_its_start_the_others_are_watched(tmp_path, capfd, moment):
    code = """
from exlm_dist.launch import watchdog
if rank == 0: os.kill(os.getpid(), signal.SIGKILL)
heartbeat.enter('step')
time.sleep(60)"""
    kill = (
        "import subprocess\nif os.environ['RANK'] == '0': subprocess.Popen = lambda *a, **k: os.kill(os.getpid(), 9)\n"
    )
    first = "" if moment == "after" else kill
    environments = rank_environments(2, tmp_path)
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-c", "import os\n" + first + RANK + code]
    supervise(command, [{**entry, "TMPDIR": str(tmp_path / "tmp")} for entry in environments], grace=30.0)
    assert "rank 1 has hung" in capfd.readouterr().err
    wait_until_clean(tmp_path)


def test_a_stopped_rank_is_named_and_the_others_show_their_stacks(tmp_path, capfd):
    code = """
heartbeat.enter('step')
beats(3)
if rank == 1: os.kill(os.getpid(), signal.SIGSTOP)
def waiting_for_rank_1():
    time.sleep(60)
waiting_for_rank_1()"""
    assert run(tmp_path, code) == EXIT_RETRY
    text = capfd.readouterr().err
    assert "rank 1 has hung for" in text and "in phase step, after 3 steps (the process is stopped" in text
    assert "the limit watchdog.step is 1 s" in text and text.count("in waiting_for_rank_1") == 2
    assert "cannot show its stack" in text and "error: rank 1 has hung" in text
    wait_until_clean(tmp_path)


def test_a_rank_that_blocks_the_interpreter_shows_where(tmp_path, capfd):
    """A C call that does not release the interpreter lock: no Python thread of the rank can run."""
    code = """
with heartbeat.phase('save'):
    beats(3)
    def a_call_that_never_returns():
        ctypes.PyDLL(None).sleep(60)
    if rank == 2: a_call_that_never_returns()
    heartbeat.beat(3)
    time.sleep(60)"""
    assert run(tmp_path, code) == EXIT_RETRY
    text = capfd.readouterr().err
    assert "rank 2 has hung" in text and "in phase save" in text and "in a_call_that_never_returns" in text


def test_ranks_that_progress_and_phases_without_a_limit_are_left_alone(tmp_path, capfd):
    code = """
time.sleep(1.2)
heartbeat.enter('step')
for _ in heartbeat.keep_alive(range(30)): time.sleep(0.05)
with heartbeat.phase('evaluation'): time.sleep(1.2)
if rank == 0: heartbeat.stop()"""
    assert run(tmp_path, code) == 0
    assert capfd.readouterr().err == ""
    wait_until_clean(tmp_path)


def test_each_part_of_the_start_has_the_time_of_the_limit(tmp_path, capfd):
    """A cold start may take longer than any of its parts may hang."""
    limit = "heartbeat.stop(); heartbeat.start(WatchdogConfig(start=1, step=0, save=0, evaluation=0, end=0), 'parts')"
    code = f"""
{limit}
for part in ('meet', 'data', 'checkpoint', 'model'):
    heartbeat.enter('start/' + part)
    time.sleep(0.5)
heartbeat.enter('start/first step')
if os.environ['RANK'] == '1': time.sleep(60)
heartbeat.beat(1)
heartbeat.enter('step')
time.sleep(60)"""
    assert run(tmp_path, code, ranks=2) == EXIT_RETRY
    text = capfd.readouterr().err
    assert "rank 1 has hung" in text and "in phase start/first step" in text and "watchdog.start is 1 s" in text


def test_it_ends_with_the_ranks_even_when_they_are_killed(tmp_path):
    assert run(tmp_path, "beats(3); os.kill(os.getpid(), signal.SIGKILL)") == EXIT_RETRY
    wait_until_clean(tmp_path)


def test_the_first_rank_may_die_at_once(tmp_path, capfd):
    """Rank 0 is killed before it has done anything; the others still have a watchdog."""
    code = """
heartbeat.enter('step')
time.sleep(60)"""
    assert run(tmp_path, code, first="if os.environ['RANK'] == '0': os.kill(os.getpid(), 9)\n") == EXIT_RETRY
    assert "ranks 1, 2 have hung" in capfd.readouterr().err
    wait_until_clean(tmp_path)


def test_what_killed_launches_left_is_swept_away(tmp_path):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    start_time = watchdog.process_state(sleeper.pid)[1]
    folders = {}
    for name, pid, age in (
        ("dead", 1 << 22, 100),
        ("alive", sleeper.pid, 100),
        ("new", 1 << 22, 0),
        ("mine", 1 << 22, 100),
    ):
        folders[name] = tmp_path / f"exlm-watch-0-{name}"
        folders[name].mkdir()
        (folders[name] / "rank-0.beat").write_bytes(watchdog.BEAT.pack(0, 0, 1, 0.0))
        (folders[name] / "rank-0.json").write_text(
            json.dumps({"rank": 0, "pid": pid, "start_time": start_time, "error_file": ""})
        )
        os.utime(folders[name], (time.time() - age,) * 2)
    (folders["mine"].parent / f"{folders['mine'].name.rpartition('-')[0]}-vanished").symlink_to("nowhere")
    watchdog._sweep(folders["mine"])  # one may vanish between being listed and being read
    sleeper.kill()
    sleeper.wait()
    assert {name for name, folder in folders.items() if folder.exists()} == {"alive", "new", "mine"}


def rank_like(number: int, beats: int, pid: int = 0) -> watchdog.Rank:
    _, start_time = watchdog.process_state(pid or os.getpid())
    return watchdog.Rank(number, pid or os.getpid(), start_time, "", "step", 5, beats, 0.0)


@pytest.mark.parametrize(
    "beats, stacks, expected",
    [
        ([7, 6, 7], ["", "", ""], [1]),
        ([7, 7, 7], ["distributed_c10d.py", "loader.py", "distributed_c10d.py"], [1]),
        ([7, 7, 7], ["distributed_c10d.py"] * 3, [0, 1, 2]),
    ],
    ids=["one is behind", "one is not in the collective", "unknown"],
)
def test_the_culprit_is_the_one_that_the_others_wait_for(beats, stacks, expected):
    ranks = [rank_like(number, count) for number, count in enumerate(beats)]
    assert [rank.rank for rank in watchdog.find_culprits(ranks, dict(enumerate(stacks)))] == expected


def test_a_stopped_rank_is_the_culprit_wherever_it_is():
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        os.kill(sleeper.pid, signal.SIGSTOP)
        while watchdog.process_state(sleeper.pid)[0] != "T":
            time.sleep(0.01)
        ranks = [rank_like(0, 6), rank_like(1, 7, sleeper.pid)]
        assert [rank.rank for rank in watchdog.find_culprits(ranks, {0: "", 1: ""})] == [1]
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_whole_job_that_was_suspended_is_excused(tmp_path, capfd):
    """The watchdog and its rank are stopped for longer than the limit, as by `scontrol suspend`."""
    code = """
import glob
heartbeat.enter('step')
beats(3)
children = [int(pid) for pid in open(f'/proc/self/task/{os.getpid()}/children').read().split()]
for pid in children: os.kill(pid, signal.SIGSTOP)
time.sleep(4.5)
for pid in children: os.kill(pid, signal.SIGCONT)
beats(40)"""
    assert run(tmp_path, code, ranks=1) == 0
    assert capfd.readouterr().err == ""


def test_without_limits_there_is_no_watchdog(tmp_path, monkeypatch):
    from exlm_dist.config.schema import WatchdogConfig

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    heartbeat.start(WatchdogConfig(start=0, step=0, save=0, evaluation=0, end=0), "test")
    heartbeat.beat(1)
    heartbeat.stop()
    assert not list(tmp_path.iterdir())


def test_a_rank_that_ends_while_its_stack_is_asked_for_does_not_end_the_watchdog(tmp_path):
    """It removes its files, and the ranks that hang must still be killed."""
    code = "import signal; signal.signal(signal.SIGUSR2, signal.SIG_IGN); print(flush=True); signal.pause()"
    alive = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        alive.stdout.readline()
        facts = {"error_file": "", "phase": "end", "step": 3, "beats": 9, "moment": time.monotonic()}
        ranks = [
            watchdog.Rank(rank=0, pid=alive.pid, start_time=watchdog.process_state(alive.pid)[1], **facts),
            watchdog.Rank(rank=1, pid=2**22 + 1, start_time="0", **facts),
        ]
        assert set(watchdog._stacks(tmp_path, ranks)) == {0, 1}
        watchdog.end_job(tmp_path, ranks, {"end": 1.0})
        assert alive.wait(10) == -signal.SIGKILL
    finally:
        alive.kill()
        alive.wait()
        alive.stdout.close()
