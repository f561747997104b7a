"""Ends a job whose ranks stand still: reads their heartbeats, puts all their stacks into the log, kills them.

One such process per machine, whatever started the ranks: each starts one (`exlm_dist.launch.heartbeat`), and the first
of them stays. It is run by its path and needs the standard library alone, so it costs some milliseconds and works while
the ranks cannot. It ends when no rank is left. Per rank the folder holds three files: `rank-N.json` (who it is),
`rank-N.beat` (its heartbeat), `rank-N.stack` (written by the rank's own faulthandler when it is asked to).
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

#: What a rank can be busy with; each has a limit in the section `watchdog` of the configuration.
PHASES = ("start", "step", "save", "evaluation", "end")
#: Phase, step, number of beats so far, moment of the last one (CLOCK_MONOTONIC, the same for all processes of a
#: machine).
BEAT = struct.Struct("<qqqd")
#: Asks a rank for its stacks; its faulthandler answers even while a C call holds the interpreter.
STACK_SIGNAL = signal.SIGUSR2
POLL = 0.5
CLAIMED = "watchdog"
#: A poll that comes this much too late means that the machine, or the whole job, was suspended: nobody hung.
SUSPENDED = 3.0
#: Seconds after which the folder of a launch without ranks is no longer that of one that begins.
STALE = 60.0
#: Seconds that the ranks get to write their stacks.
PATIENCE = 3.0
#: Frames that show that a rank only waits for another one.
_WAITING = ("distributed_c10d", "deepspeed/comm")


@dataclass(frozen=True)
class Rank:
    """One rank of this machine as it was last seen."""

    rank: int
    pid: int
    born: str
    error_file: str
    phase: str
    step: int
    beats: int
    moment: float

    @property
    def state(self) -> str:
        """Letter of the kernel: T stopped, D waiting for a device, R running, S sleeping; empty when it is gone."""
        found = process_state(self.pid)
        return found[0] if found is not None and found[1] == self.born else ""


def process_state(pid: int) -> tuple[str, str] | None:
    """(state letter, time of birth) of a process; None when there is none, or only its zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else (fields[0], fields[19])


def read_ranks(folder: Path) -> list[Rank]:
    """The ranks that are registered in `folder` and alive; files of dead ones are removed."""
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
        elif (about_now := _written(path)) and json.loads(about_now)["pid"] == rank.pid:
            remove(path)
    return ranks


def remove(path: Path) -> None:
    """Forget the rank whose registration is `path`."""
    for suffix in (".json", ".beat", ".stack"):
        path.with_suffix(suffix).unlink(missing_ok=True)


def watch(folder: Path, limits: Mapping[str, float]) -> None:
    """Look at the ranks until none is left; end the job when one has stood still for longer than its phase may."""
    seen = time.monotonic()
    excused = 0.0
    suspects: set[int] = set()
    while ranks := read_ranks(folder):
        now = time.monotonic()
        if now - seen > POLL + SUSPENDED:
            excused = now
        seen = now
        late = {
            rank.rank for rank in ranks if limits[rank.phase] and now - max(rank.moment, excused) > limits[rank.phase]
        }
        if late & suspects:  # seen twice, so not read in the middle of a beat
            end_job(folder, ranks, limits)
            _see_them_gone(folder)
            return
        suspects = late
        time.sleep(POLL)


def end_job(folder: Path, ranks: list[Rank], limits: Mapping[str, float]) -> None:
    """Put the stacks of all ranks into the log, say which one hangs, and kill all of them."""
    now = time.monotonic()
    stacks = _stacks(folder, ranks)
    culprits = find_culprits(ranks, stacks)
    message = describe(culprits, limits, now)
    lines = [f"==== watchdog on {socket.gethostname()}: {message}"]
    for rank in ranks:
        lines += [
            f"---- rank {rank.rank} (pid {rank.pid}): phase {rank.phase}, {rank.step} steps done, beat {rank.beats}, "
            f"{now - rank.moment:.1f} s ago",
            stacks[rank.rank],
        ]
    _say("\n".join([*lines, "==== watchdog: all ranks of this machine are ended now; the run may be started again."]))
    for rank in ranks:
        if rank.error_file:
            try:
                Path(rank.error_file).write_text(message)
            except OSError as error:  # a full disk must not keep the hung job alive
                _say(f"==== watchdog: {rank.error_file} cannot be written: {error}")
    named = {rank.rank for rank in culprits}
    for rank in sorted(ranks, key=lambda rank: rank.rank in named):  # those who wait first: they have nothing to add
        if rank.state:
            _send(rank, signal.SIGKILL)


def _send(rank: Rank, number: int) -> None:
    """A signal to a rank that may end at this moment."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(rank.pid, number)


def _written(path: Path) -> bytes:
    """What a rank has written by now; nothing when it has ended meanwhile and taken its files along."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _see_them_gone(folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while left := read_ranks(folder):
        if time.monotonic() > deadline:
            names = ", ".join(f"rank {rank.rank} (pid {rank.pid}, state {rank.state})" for rank in left)
            _say(f"==== watchdog: {names} cannot be killed: the process waits inside the kernel. Drain this machine.")
            return
        time.sleep(POLL / 5)


def find_culprits(ranks: list[Rank], stacks: Mapping[int, str]) -> list[Rank]:
    """The ranks that the others wait for: stopped ones, else those behind, else those not inside a collective.

    All ranks beat at the same places of the program, so the number of beats says how far each has come.
    """
    stopped = [rank for rank in ranks if rank.state in ("T", "t")]
    if stopped:
        return stopped
    behind = [rank for rank in ranks if rank.beats == min(rank.beats for rank in ranks)]
    busy = [rank for rank in behind if not any(sign in stacks[rank.rank] for sign in _WAITING)]
    return busy or behind


def describe(culprits: list[Rank], limits: Mapping[str, float], now: float) -> str:
    """One sentence: ranks, phase, seconds, limit."""
    first = culprits[0]
    seconds = now - max(rank.moment for rank in culprits)
    who = (
        f"rank {first.rank} has"
        if len(culprits) == 1
        else f"ranks {', '.join(str(rank.rank) for rank in culprits)} have"
    )
    why = {"T": " (the process is stopped, by SIGSTOP or a debugger)", "D": " (the process waits for a device)"}
    return (
        f"{who} stood still for {seconds:.0f} s in phase {first.phase}, after {first.step} steps"
        f"{why.get(first.state.upper(), '')}; the limit watchdog.{first.phase} is {limits[first.phase]:g} s"
    )


def _stacks(folder: Path, ranks: list[Rank]) -> dict[int, str]:
    """The stacks of all threads of every rank, or why there are none."""
    asked = {}
    stacks = {}
    for rank in ranks:
        path = folder / f"rank-{rank.rank}.stack"
        if rank.state in ("T", "t"):
            stacks[rank.rank] = "This process is stopped and cannot show its stack."
        elif rank.state:
            asked[rank.rank] = path
            _send(rank, STACK_SIGNAL)
        else:
            stacks[rank.rank] = "This process has ended."
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        former = {rank: _written(path) for rank, path in asked.items()}
        time.sleep(0.2)
        if all(former[rank] and former[rank] == _written(path) for rank, path in asked.items()):
            break
    for rank, path in asked.items():
        stacks[rank] = _written(path).decode(errors="replace").rstrip() or (
            f"No stack within {PATIENCE:g} s: the process does not answer to signals (a device, or a file system)."
        )
    return stacks


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main(folder: str, limits: str) -> None:
    """Watch `folder`; `limits`: JSON of seconds by phase."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # these are for the ranks; it ends with them
    mine = Path(folder)
    # Again: a rank that came when the others had just gone has no watchdog of its own, as there was one.
    while read_ranks(mine) and _claim(mine):
        _sweep(mine)
        watch(mine, json.loads(limits))
        remove_empty(mine)
    if not read_ranks(mine):  # the one that started this was killed at once
        remove_empty(mine)


def _sweep(mine: Path) -> None:
    """Remove what launches have left of which even the watchdog was killed, as Slurm does at the end of a step."""
    for folder in mine.parent.glob(mine.name.rpartition("-")[0] + "-*"):
        try:
            changed = folder.stat().st_mtime
        except FileNotFoundError:  # its own watchdog has just removed it
            continue
        if folder != mine and time.time() - changed > STALE and not read_ranks(folder):
            remove_empty(folder)


def _claim(folder: Path) -> bool:
    """Whether this is the watchdog of `folder`: true for the first that asks."""
    try:
        os.close(os.open(folder / CLAIMED, os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    return True


def remove_empty(folder: Path) -> None:
    """Remove the folder of a launch, and the claim to it, unless a rank is registered there."""
    try:
        (folder / CLAIMED).unlink(missing_ok=True)
        os.rmdir(folder)
    except OSError:
        pass  # not empty, or somebody else was faster


if __name__ == "__main__":
    main(*sys.argv[1:])
