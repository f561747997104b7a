"""The heartbeat of this rank: what it is doing and when it last progressed, for the watchdog of the node to read.

A beat is one small write to the page cache (two microseconds). Each process has one heartbeat; before `start` all calls
do nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from exlm_dist.config.schema import WatchdogConfig
from exlm_dist.launch import watchdog
from exlm_dist.utils.errors import ERROR_FILE, ConfigError

#: Environment variables that tell the launches on a node apart; all ranks of a launch have the same.
_OF_THE_LAUNCH = (
    "EXLM_LAUNCH",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_NODEID",
    "MASTER_ADDR",
    "MASTER_PORT",
)
Item = TypeVar("Item")


class Heartbeat:
    """One rank's files in the folder that the watchdog reads."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.phase, self.step, self.beats = "start", 0, 0
        base = folder / f"rank-{rank}"
        self._registration = base.with_suffix(".json")
        self._beat = os.open(base.with_suffix(".beat"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._stack = os.open(base.with_suffix(".stack"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        faulthandler.register(watchdog.STACK_SIGNAL, file=self._stack, all_threads=True)
        self.beat()
        _, start_time = watchdog.process_state(os.getpid()) or ("", "")
        error_file = os.path.abspath(os.environ[ERROR_FILE]) if os.environ.get(ERROR_FILE) else ""
        about = {"rank": rank, "pid": os.getpid(), "start_time": start_time, "error_file": error_file}
        temporary = base.with_suffix(".new")
        temporary.write_text(json.dumps(about))
        os.replace(temporary, self._registration)

    def beat(self, points: int = 1) -> None:
        """Record progress, past so many of the points at which all ranks beat."""
        self.beats += points
        phase = watchdog.PHASES.index(self.phase)
        os.pwrite(self._beat, watchdog.BEAT.pack(phase, self.step, self.beats, time.monotonic()), 0)

    def stop(self) -> None:
        """Withdraw from the watchdog."""
        watchdog.remove(self._registration)
        faulthandler.unregister(watchdog.STACK_SIGNAL)
        os.close(self._beat)
        os.close(self._stack)


_heartbeat: Heartbeat | None = None


def start(limits: WatchdogConfig, run: str) -> None:
    """Begin to beat, in phase `start`. `run`: name of the run. Every rank starts a watchdog, and one per node stays: if
    that were left to one rank, the others would have none when it is killed first.

    Call it before anything slow. Does nothing if every limit is 0, or if /proc does not show processes.
    """
    global _heartbeat
    seconds = limits.model_dump()
    if not any(seconds.values()) or watchdog.process_state(os.getpid()) is None:
        return
    folder = _folder(run)
    _heartbeat = Heartbeat(folder, int(os.environ.get("RANK", "0")))
    # -I -S: without site-packages it starts in 20 ms; its own session, so that Ctrl-C reaches the ranks alone.
    command = [sys.executable, "-I", "-S", watchdog.__file__, str(folder), json.dumps(seconds)]
    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True, cwd="/")


def beat(step: int) -> None:
    """Record that this rank has come to the next point at which all ranks beat; `step`: optimizer steps done so far."""
    if _heartbeat is not None:
        _heartbeat.step = step
        _heartbeat.beat()


def alive() -> None:
    """Record progress at a point that other ranks may not pass, or not as often."""
    if _heartbeat is not None:
        _heartbeat.beat(0)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Enter phase `name`, with its limit, and return to the former one at the end."""
    former = _enter(name)
    try:
        yield
    finally:
        _enter(former)


def enter(name: str) -> None:
    """Enter phase `name` for good."""
    _enter(name)


def keep_alive(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items, with a sign of life at each."""
    for item in items:
        alive()
        yield item


def stop() -> None:
    """End the heartbeat; if other ranks still run, only directly before the process exits. The watchdog ends with the
    last one."""
    global _heartbeat
    if _heartbeat is not None:
        _heartbeat.stop()
        _heartbeat = None


def _enter(name: str) -> str:
    if _heartbeat is None:
        return name
    former, _heartbeat.phase = _heartbeat.phase, name
    _heartbeat.beat()
    return former


def _folder(run: str) -> Path:
    """Folder of this launch, local to the node and private; ConfigError if another user owns one of that name."""
    parts = [run, *(os.environ.get(name, "") for name in _OF_THE_LAUNCH)]
    if "RANK" not in os.environ:
        parts.append(str(os.getpid()))
    key = hashlib.blake2b("\x1f".join(parts).encode(), digest_size=8).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"exlm-watch-{os.getuid()}-{key}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ConfigError(f"{folder} belongs to another user. Set TMPDIR to a folder of your own.")
    return folder
