"""The heartbeat of this rank: where it is in its work, written so that the watchdog of the machine can see it stand
still.

A beat is one small write into the page cache (two microseconds). A process has one heart; without `start` all calls do
nothing.
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

#: What tells the launches on a machine apart; the same for all ranks of one.
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


class Heart:
    """One rank's files in the folder that it shares with the watchdog."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.phase, self.step, self.beats = "start", 0, 0
        base = folder / f"rank-{rank}"
        self._registration = base.with_suffix(".json")
        self._beat = os.open(base.with_suffix(".beat"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._stack = os.open(base.with_suffix(".stack"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        faulthandler.register(watchdog.STACK_SIGNAL, file=self._stack, all_threads=True)
        self.beat()
        _, born = watchdog.process_state(os.getpid()) or ("", "")
        error_file = os.path.abspath(os.environ[ERROR_FILE]) if os.environ.get(ERROR_FILE) else ""
        about = {"rank": rank, "pid": os.getpid(), "born": born, "error_file": error_file}
        temporary = base.with_suffix(".new")
        temporary.write_text(json.dumps(about))
        os.replace(temporary, self._registration)

    def beat(self, places: int = 1) -> None:
        """Say that this rank has moved, past so many of the places at which all ranks beat."""
        self.beats += places
        moment = time.monotonic()
        place = watchdog.PHASES.index(self.phase)
        os.pwrite(self._beat, watchdog.BEAT.pack(place, self.step, self.beats, moment), 0)

    def stop(self) -> None:
        """No longer be watched."""
        watchdog.remove(self._registration)
        faulthandler.unregister(watchdog.STACK_SIGNAL)
        os.close(self._beat)
        os.close(self._stack)


_heart: Heart | None = None


def start(limits: WatchdogConfig, run: str) -> None:
    """Begin to beat, in phase `start`. `run`: its name. Each rank starts a watchdog, of which one per machine stays:
    had only one rank to start it, the others would have none when that rank is killed meanwhile.

    Call it before anything slow. Does nothing where every limit is 0, or where the system shows no processes in /proc.
    """
    global _heart
    seconds = limits.model_dump()
    if not any(seconds.values()) or watchdog.process_state(os.getpid()) is None:
        return
    folder = _folder(run)
    _heart = Heart(folder, int(os.environ.get("RANK", "0")))
    # -I -S: no site-packages, so it is there in 20 ms; a session of its own, so that Ctrl-C is for the ranks.
    command = [sys.executable, "-I", "-S", watchdog.__file__, str(folder), json.dumps(seconds)]
    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True, cwd="/")


def beat(step: int) -> None:
    """Say that this rank has come to the next place at which all ranks beat; `step`: optimizer steps done by now."""
    if _heart is not None:
        _heart.step = step
        _heart.beat()


def alive() -> None:
    """Say that this rank still moves, at a place that others may not pass, or not as often."""
    if _heart is not None:
        _heart.beat(0)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Be in phase `name` inside (its limit holds), then back in the former one."""
    former = _enter(name)
    try:
        yield
    finally:
        _enter(former)


def enter(name: str) -> None:
    """Be in phase `name` from now on."""
    _enter(name)


def keep_alive(items: Iterable[Item]) -> Iterator[Item]:
    """The items, with a sign of life at each."""
    for item in items:
        alive()
        yield item


def stop() -> None:
    """End the heartbeat, directly before the end of the process if others run with it; the watchdog ends with the last
    one."""
    global _heart
    if _heart is not None:
        _heart.stop()
        _heart = None


def _enter(name: str) -> str:
    if _heart is None:
        return name
    former, _heart.phase = _heart.phase, name
    _heart.beat()
    return former


def _folder(run: str) -> Path:
    """Folder of this launch, node-local and private; ConfigError when somebody else owns one of that name."""
    parts = [run, *(os.environ.get(name, "") for name in _OF_THE_LAUNCH)]
    if "RANK" not in os.environ:
        parts.append(str(os.getpid()))
    key = hashlib.blake2b("\x1f".join(parts).encode(), digest_size=8).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"exlm-watch-{os.getuid()}-{key}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ConfigError(f"{folder} belongs to another user. Set TMPDIR to a folder of your own.")
    return folder
