"""Starts the ranks of a run on this machine, forwards signals, and ends all of them when one fails. No torch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from exlm_dist.launch.restart import Restarts
from exlm_dist.utils.cores import available_cores
from exlm_dist.utils.errors import CHOSEN_PORT, ERROR_FILE, EXIT_RETRY
from exlm_dist.utils.signals import caught_signals, die_with_parent, leave_lost_terminal

RANK_COMMAND = [sys.executable, "-m", "exlm_dist.cli", "pretrain"]
#: Seconds within which the other ranks must end by themselves once one has failed.
GRACE = 15.0


def rank_arguments(path: str, overrides: Sequence[str], *, allow_changes: bool) -> list[str]:
    """What a rank gets after `exlm pretrain`."""
    return [path, *(["--allow-changes"] if allow_changes else []), *overrides]


def run_local(arguments: Sequence[str], processes: int, restarts: Restarts, *, grace: float = GRACE) -> int:
    """Run `exlm pretrain ARGUMENTS` as `processes` ranks here and return the exit code of the run.

    TERM, USR1, INT and HUP are forwarded to every rank. The code is 0 if all ranks succeeded, else that of the rank
    that failed first, whose message is repeated at the end; a rank killed by a signal counts as 76. Ranks that ended
    with 76 are restarted as `restarts` says, unless a signal has asked the run to end.
    """
    command = [*RANK_COMMAND, *map(str, arguments)]
    received: list[int] = []
    while True:
        with tempfile.TemporaryDirectory(prefix="exlm-") as folder:
            code = supervise(command, rank_environments(processes, Path(folder)), grace=grace, received=received)
        ended = code if received else restarts.next_code(code)
        if ended is not None:
            return ended


def rank_environments(processes: int, folder: Path) -> list[dict[str, str]]:
    """The environment of each rank; their rendezvous is at a port that was free a moment ago."""
    shared = {
        **os.environ,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "EXLM_LAUNCH": uuid.uuid4().hex,
    }
    if not shared.get("MASTER_PORT"):
        shared |= {"MASTER_PORT": str(free_port()), CHOSEN_PORT: "1"}
    shared.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // processes)))
    if Path("/sys/class/net/lo").exists():
        # The host's name may resolve to an address that is not reachable from here.
        shared.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return [
        {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), ERROR_FILE: str(folder / f"rank-{rank}")}
        for rank in range(processes)
    ]


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def supervise(
    command: Sequence[str],
    environments: Sequence[dict[str, str]],
    *,
    grace: float = GRACE,
    received: list[int] | None = None,
) -> int:
    """Start one process per environment, wait until all have ended, and return the exit code of the run (`run_local`).
    Signals that arrive meanwhile are forwarded, and appended to `received`."""
    ranks: list[subprocess.Popen[bytes]] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:
            leave_lost_terminal()
        if received is not None:
            received.append(signum)
        for rank in ranks:
            rank.send_signal(signum)

    former = {signum: signal.signal(signum, forward) for signum in caught_signals()}
    try:
        for environment in environments:
            # A killed supervisor leaves no orphans.
            ranks.append(subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=die_with_parent))
        failed = _wait(ranks, grace)
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
    return _exit_code(ranks, failed, environments)


def _wait(ranks: list[subprocess.Popen[bytes]], grace: float) -> list[int]:
    """Wait until all have ended, or `grace` is over; the ranks that failed, in the order in which that was seen."""
    failed: list[int] = []
    deadline = float("inf")
    while True:
        codes = [rank.poll() for rank in ranks]
        failed += [rank for rank, code in enumerate(codes) if code and rank not in failed]
        if all(code is not None for code in codes):
            return failed
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + grace
        if time.monotonic() > deadline:
            return failed
        time.sleep(0.05)


def _exit_code(ranks: list[subprocess.Popen[bytes]], failed: list[int], environments: Sequence[dict[str, str]]) -> int:
    if not failed:
        return 0
    # A rank that only lost its peer ends with EXIT_RETRY: if any ended otherwise, that one is the cause.
    cause = next((rank for rank in failed if ranks[rank].returncode != EXIT_RETRY), failed[0])
    code = ranks[cause].returncode
    message = _message(environments[cause])
    if code < 0:
        # The watchdog leaves its reason for every rank that it kills.
        why = message or f"rank {cause} was killed by {signal.Signals(-code).name}"
        print(f"error: {why}", file=sys.stderr, flush=True)
        return EXIT_RETRY
    if message:
        print(
            f"error: rank {cause} of {len(ranks)} ended the run (exit code {code}): {message}",
            file=sys.stderr,
            flush=True,
        )
    return code


def _message(environment: dict[str, str]) -> str:
    path = Path(environment.get(ERROR_FILE, ""))
    return path.read_text(errors="replace").strip() if path.is_file() else ""
