"""The watchdog ends a job that hangs, names the rank and logs the stacks; the ranks are a few lines of Python."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from exlm_dist.launch import heartbeat, watchdog
from exlm_dist.launch.local import rank_environments, supervise
from exlm_dist.launch.slurm_scripts import PRETRAIN
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


def test_a_node_whose_ranks_may_all_be_waiting_says_so(tmp_path, capfd, monkeypatch):
    """Under NCCL a rank waits in a synchronisation, which its stack does not tell from work. Beats are comparable
    between nodes, and in the message."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(watchdog, "_stacks", lambda folder, ranks: {rank.rank: "in train_step" for rank in ranks})
    errors = [tmp_path / "rank-0", tmp_path / "rank-1"]
    ranks = [dataclasses.replace(rank_like(n, 7), start_time="gone", error_file=str(errors[n])) for n in range(2)]
    watchdog.end_hung_job(tmp_path, ranks, {"step": 1.0})
    said = errors[0].read_text()
    assert "ranks 0, 1 have hung" in said and "after 5 steps, at beat 7" in said
    assert said.endswith("if another node names ranks at fewer beats, these waited for them")
    monkeypatch.setenv("WORLD_SIZE", "2")
    watchdog.end_hung_job(tmp_path, ranks, {"step": 1.0})
    assert "another node" not in errors[0].read_text()


def test_the_job_file_shows_the_ranks_first_that_had_come_least_far(tmp_path):
    reports = {
        0: "ranks 0, 1 have hung for 61 s in phase step, after 5 steps, at beat 12; the limit watchdog.step is 60 s",
        1: "ranks 0, 1 have hung for 61 s in phase step, after 5 steps, at beat 12; the limit watchdog.step is 60 s",
        2: "rank 2 has hung for 61 s in phase step, after 5 steps, at beat 9; the limit watchdog.step is 60 s",
        3: "died: rank 7 in phase step",
    }
    for rank, report in reports.items():
        (tmp_path / f"rank-{rank}").write_text(report)
    function = "messages() {" + PRETRAIN.partition("messages() {")[2].partition("\n}\n")[0] + "\n}\nmessages"
    environment = {"PATH": os.environ["PATH"], "EXLM_ERRORS": str(tmp_path)}
    said = subprocess.run(["bash", "-c", function], env=environment, capture_output=True, text=True, timeout=30)
    assert said.stdout.splitlines() == [reports[3], reports[2], reports[0]]


def registered(folder: Path, rank: int, process: subprocess.Popen, phase: str) -> None:
    """The files of a rank whose process is `process`."""
    _, start_time = watchdog.process_state(process.pid)
    beat = watchdog.BEAT.pack(watchdog.PHASES.index(phase), 5, 9, time.monotonic())
    (folder / f"rank-{rank}.beat").write_bytes(beat)
    about = {"rank": rank, "pid": process.pid, "start_time": start_time, "error_file": str(folder / f"error-{rank}")}
    (folder / f"rank-{rank}.json").write_text(json.dumps(about))


@pytest.mark.parametrize("phase", ["step", "failure", "end"])
def test_ranks_that_do_not_notice_the_death_of_another_are_ended(tmp_path, capfd, monkeypatch, phase):
    """As on a GPU, where they wait for it for ever: also for one that ended with an error, not at its regular end. A
    rank that is ending itself is left alone."""
    monkeypatch.setattr(watchdog, "UNNOTICED", 0.5)
    monkeypatch.setattr(watchdog, "POLL", 0.05)
    monkeypatch.setattr(watchdog, "_stacks", lambda folder, ranks: {rank.rank: "in synchronize" for rank in ranks})
    waiting, ending = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    dead = subprocess.Popen(["sleep", "60"])
    try:
        for rank, process, doing in ((0, waiting, "step"), (1, dead, phase), (2, ending, "failure")):
            registered(tmp_path, rank, process, doing)
        dead.kill()
        dead.wait()
        if phase == "end":
            threading.Timer(1.5, lambda: [process.kill() for process in (waiting, ending)]).start()
            watchdog.watch(tmp_path, dict.fromkeys(watchdog.PHASES, 0))
            assert capfd.readouterr().err == ""
            return
        watchdog.watch(tmp_path, dict.fromkeys(watchdog.PHASES, 0))
        assert waiting.wait(10) == -signal.SIGKILL and ending.poll() is None
        text = capfd.readouterr().err
        assert f"died: rank 1 in phase {phase}, after 5 steps" in text and (tmp_path / "error-0").read_text() in text
    finally:
        for process in (waiting, ending):
            process.kill()
            process.wait()


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
        watchdog.end_hung_job(tmp_path, ranks, {"end": 1.0})
        assert alive.wait(10) == -signal.SIGKILL
    finally:
        alive.kill()
        alive.wait()
        alive.stdout.close()
