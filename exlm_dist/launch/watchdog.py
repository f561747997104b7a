"""Ends a job that hangs, or has lost a rank without noticing: reads the heartbeats of its ranks, logs the stacks of all
of them, and kills them.

One such process per node, whatever started the ranks: every rank starts one (`exlm_dist.launch.heartbeat`), and the
first stays. It is run by its path and needs only the standard library, so it starts in milliseconds and works when the
ranks no longer do. It ends when no rank is left. Each rank has three files in the folder: `rank-N.json` (who it is),
`rank-N.beat` (its heartbeat) and `rank-N.stack` (written by the rank's own faulthandler on request).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: What a rank can be doing, in this order: imports and the parts of the start that follow them, then the run, then its
#: end, or that on an error.
PHASES = ("start", "start/meet", "start/data", "start/checkpoint", "start/model", "start/weights", "start/first step")
PHASES += ("step", "save", "evaluation", "end", "failure")
#: Phase, step, beats so far, time of the last one (CLOCK_MONOTONIC, which all processes of a node have in common).
BEAT = struct.Struct("<qqqd")
#: Phases in which a rank waits for others.
WORKING = PHASES[:-2]
#: Asks a rank for its stacks; its faulthandler answers even while a C call has the interpreter lock.
STACK_SIGNAL = signal.SIGUSR2
POLL = 0.5
CLAIMED = "watchdog"
#: A poll that is this many seconds late means that the node, or the whole job, was suspended: no rank hung.
SUSPENDED = 3.0
#: Seconds after which a folder without ranks is a leftover, no longer that of a launch about to begin.
STALE = 60.0
#: Seconds within which the ranks must write their stacks, and be gone once they are killed.
PATIENCE = 3.0
#: Seconds within which the other ranks must notice by themselves that one of the node has died. Those that wait for it
#: on a GPU never do.
UNNOTICED = 10.0
#: States of a process that a signal or a debugger has stopped.
STOPPED = ("T", "t")
#: Frames of a rank that only waits for another one.
_WAITING = ("distributed_c10d", "deepspeed/comm", "torch/cuda/streams.py", "torch/cuda/__init__.py")


@dataclass(frozen=True)
class Rank:
    """One rank of this node, as last seen."""

    rank: int
    pid: int
    start_time: str
    error_file: str
    phase: str
    step: int
    beats: int
    moment: float

    @property
    def state(self) -> str:
        """State letter of the kernel: T stopped, D waiting for a device, R running, S sleeping; empty if it is gone."""
        found = process_state(self.pid)
        return found[0] if found is not None and found[1] == self.start_time else ""


def process_state(pid: int) -> tuple[str, str] | None:
    """(state letter, start time) of a process; None if there is none, or only its zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else (fields[0], fields[19])


def read_ranks(folder: Path, lost: list[Rank] | None = None) -> list[Rank]:
    """The ranks that are registered in `folder` and alive; the files of dead ones are removed. Those that did not die
    at their regular end are added to `lost`."""
    ranks = []
    for path in sorted(folder.glob("rank-*.json")):
        try:
            about = json.loads(path.read_text())
            phase, step, beats, moment = BEAT.unpack(path.with_suffix(".beat").read_bytes()[: BEAT.size])
        except FileNotFoundError:
            continue  # it has just ended
        rank = Rank(**about, phase=PHASES[phase], step=step, beats=beats, moment=moment)
        if rank.state:
            ranks.append(rank)
        elif (about_now := _read(path)) and json.loads(about_now)["pid"] == rank.pid:
            remove(path)
            if lost is not None and rank.phase != "end":
                lost.append(rank)
    return ranks


def limit_of(phase: str) -> str:
    """Name of its limit in the section `watchdog` of the configuration; that of `start` counts for each part of it."""
    return phase.partition("/")[0]


def remove(path: Path) -> None:
    """Remove the files of the rank whose registration is `path`."""
    for suffix in (".json", ".beat", ".stack"):
        path.with_suffix(suffix).unlink(missing_ok=True)


def watch(folder: Path, limits: Mapping[str, float]) -> None:
    """Poll the ranks until none is left; end the job when one has not beaten for longer than its phase allows, or when
    one has died and others have not noticed."""
    seen = time.monotonic()
    excused = died = 0.0
    suspects: set[int] = set()
    lost: list[Rank] = []
    while ranks := read_ranks(folder, lost):
        now = time.monotonic()
        if now - seen > POLL + SUSPENDED:
            excused = now
        seen = now
        allowed = {rank.rank: limits[limit_of(rank.phase)] for rank in ranks}
        late = {
            rank.rank for rank in ranks if allowed[rank.rank] and now - max(rank.moment, excused) > allowed[rank.rank]
        }
        if late & suspects:  # seen twice, so the beat was not read half-written
            end_hung_job(folder, ranks, limits)
            return
        suspects = late
        died = died or (now if lost else 0.0)
        if died and now - max(died, excused) > UNNOTICED and any(rank.phase in WORKING for rank in ranks):
            end_orphans(folder, [rank for rank in ranks if rank.phase in WORKING], lost)
            return
        time.sleep(POLL)


def end_hung_job(folder: Path, ranks: list[Rank], limits: Mapping[str, float]) -> None:
    """Log which ranks hang and the stacks of all, and kill them all, those that wait first: before they can report a
    lost peer."""
    stacks = _stacks(folder, ranks)
    culprits = find_culprits(ranks, stacks)
    stopped = any(rank.state in STOPPED for rank in culprits)
    elsewhere = int(os.environ.get("WORLD_SIZE", "1")) > len(ranks) == len(culprits) and not stopped
    named = {rank.rank for rank in culprits}
    message = describe(culprits, limits, time.monotonic(), elsewhere=elsewhere)
    end_job(folder, sorted(ranks, key=lambda rank: rank.rank in named), message, stacks)


def end_orphans(folder: Path, ranks: list[Rank], lost: list[Rank]) -> None:
    """Log which ranks have died and the stacks of those that wait for them, and kill these."""
    who = ", ".join(f"rank {rank.rank} in phase {rank.phase}, after {rank.step} steps" for rank in lost)
    message = f"died: {who}; ranks that had not noticed after {UNNOTICED:g} s were ended"
    end_job(folder, ranks, message, _stacks(folder, ranks))


def end_job(folder: Path, ranks: list[Rank], message: str, stacks: Mapping[int, str]) -> None:
    """Log `message` and the stacks, leave the message to whoever started the ranks, and kill them in this order."""
    now = time.monotonic()
    lines = [f"==== watchdog on {socket.gethostname()}: {message}"]
    for rank in sorted(ranks, key=lambda rank: rank.rank):
        lines += [
            f"---- rank {rank.rank} (pid {rank.pid}): phase {rank.phase}, {rank.step} steps done, beat {rank.beats}, "
            f"{now - rank.moment:.1f} s ago",
            stacks[rank.rank],
        ]
    _log("\n".join([*lines, "==== watchdog: these ranks are killed now; the run may be restarted."]))
    for rank in ranks:
        if rank.error_file:
            try:
                Path(rank.error_file).write_text(message)
            except OSError as error:  # a full disk must not keep the hung job alive
                _log(f"==== watchdog: {rank.error_file} cannot be written: {error}")
    for rank in ranks:
        if rank.state:
            _send(rank, signal.SIGKILL)
    wait_until_gone(folder, {rank.rank for rank in ranks})


def _send(rank: Rank, signum: int) -> None:
    """Send a signal to a rank, which may just have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(rank.pid, signum)


def _read(path: Path) -> bytes:
    """What a rank has written so far; empty if it has ended meanwhile and removed its files."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def wait_until_gone(folder: Path, numbers: set[int]) -> None:
    """Wait until none of these ranks is left, for at most PATIENCE seconds; log those that cannot be killed."""
    deadline = time.monotonic() + PATIENCE
    while left := [rank for rank in read_ranks(folder) if rank.rank in numbers]:
        if time.monotonic() > deadline:
            names = ", ".join(f"rank {rank.rank} (pid {rank.pid}, state {rank.state})" for rank in left)
            _log(f"==== watchdog: {names} cannot be killed: the process waits inside the kernel. Drain this node.")
            return
        time.sleep(POLL / 5)


def find_culprits(ranks: list[Rank], stacks: Mapping[int, str]) -> list[Rank]:
    """The ranks that the others wait for: stopped ones; else, of those that are behind, the ones not in a collective.

    All ranks beat at the same points of the program, so the number of beats says how far each has come.
    """
    stopped = [rank for rank in ranks if rank.state in STOPPED]
    if stopped:
        return stopped
    behind = [rank for rank in ranks if rank.beats == min(rank.beats for rank in ranks)]
    busy = [rank for rank in behind if not any(sign in stacks[rank.rank] for sign in _WAITING)]
    return busy or behind


def describe(culprits: list[Rank], limits: Mapping[str, float], now: float, *, elsewhere: bool = False) -> str:
    """One sentence: which ranks hang, for how long, in which phase, and its limit. `elsewhere`: they may all be waiting
    for a rank of another node. The beats tell: they count the same points of the program on every rank."""
    first = culprits[0]
    limit = limit_of(first.phase)
    seconds = now - max(rank.moment for rank in culprits)
    who = (
        f"rank {first.rank} has"
        if len(culprits) == 1
        else f"ranks {', '.join(str(rank.rank) for rank in culprits)} have"
    )
    whys = {"T": " (the process is stopped, by SIGSTOP or a debugger)", "D": " (the process waits for a device)"}
    why = whys.get(first.state.upper(), "")
    return (
        f"{who} hung for {seconds:.0f} s in phase {first.phase}, after {first.step} steps{why}, at beat {first.beats}; "
        f"the limit watchdog.{limit} is {limits[limit]:g} s"
        f"{'; if another node names ranks at fewer beats, these waited for them' if elsewhere else ''}"
    )


def _stacks(folder: Path, ranks: list[Rank]) -> dict[int, str]:
    """The stacks of all threads of each rank, or why there are none."""
    requested: dict[int, Path] = {}
    stacks = {}
    for rank in ranks:
        if rank.state in STOPPED:
            stacks[rank.rank] = "This process is stopped and cannot show its stack."
        elif rank.state:
            requested[rank.rank] = folder / f"rank-{rank.rank}.stack"
            _send(rank, STACK_SIGNAL)
        else:
            stacks[rank.rank] = "This process has ended."
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        before = {path: _read(path) for path in requested.values()}
        time.sleep(0.2)
        if all(text and text == _read(path) for path, text in before.items()):
            break
    for number, path in requested.items():
        stacks[number] = _read(path).decode(errors="replace").rstrip() or (
            f"No stack within {PATIENCE:g} s: the process does not respond to signals (a device, or a file system)."
        )
    return stacks


def _log(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main(folder: str, limits: str) -> None:
    """Watch `folder`. `limits`: seconds by phase, as JSON."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # these are for the ranks; the watchdog ends with them
    mine = Path(folder)
    seconds = json.loads(limits)
    seconds["failure"] = seconds["end"]
    # Again: a rank that started when the others had just ended left the watching to this process.
    while read_ranks(mine) and _claim(mine):
        _sweep(mine)
        watch(mine, seconds)
        remove_empty(mine)
    if not read_ranks(mine):  # the rank that started this was killed at once
        remove_empty(mine)


def _sweep(mine: Path) -> None:
    """Remove the folders of launches whose watchdog was killed as well, as Slurm does at the end of a step."""
    for folder in mine.parent.glob(mine.name.rpartition("-")[0] + "-*"):
        try:
            changed = folder.stat().st_mtime
        except FileNotFoundError:  # its own watchdog has just removed it
            continue
        if folder != mine and time.time() - changed > STALE and not read_ranks(folder):
            remove_empty(folder)


def _claim(folder: Path) -> bool:
    """Whether this process is the watchdog of `folder`: true for the first that asks."""
    try:
        os.close(os.open(folder / CLAIMED, os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    return True


def remove_empty(folder: Path) -> None:
    """Remove the folder of a launch and the claim to it, unless a rank is registered there."""
    try:
        (folder / CLAIMED).unlink(missing_ok=True)
        os.rmdir(folder)
    except OSError:
        pass  # not empty, or already removed


if __name__ == "__main__":
    main(*sys.argv[1:])
