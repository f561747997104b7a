"""A run under the DeepSpeed launcher: command, environment, and a supervisor that forwards signals to the ranks.

The launcher itself turns SIGTERM into exit code 1 and does not handle SIGUSR1; the ranks handle both (save after the
current step, exit with 75). So signals go straight to the ranks; the launcher only reports how they ended. No torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from exlm_dist.launch.local import free_port
from exlm_dist.launch.restart import Restarts, exit_code
from exlm_dist.utils.errors import CHOSEN_PORT, ConfigError
from exlm_dist.utils.signals import caught_signals, leave_lost_terminal

RANK_MODULE = "exlm_dist.cli"


def deepspeed_command(
    arguments: Sequence[str], *, processes: int, port: int, hostfile: Path | None = None
) -> list[str]:
    """Command line that starts `exlm pretrain ARGUMENTS` on `processes` local ranks, or on every slot of `hostfile`.

    Raises:
        ConfigError: the host file does not exist (the launcher would silently start one local rank).
    """
    if hostfile is not None and not hostfile.is_file():
        raise ConfigError(f"no host file at {hostfile}. It lists one `hostname slots=8` per line.")
    where = ["--hostfile", str(hostfile)] if hostfile else ["--hostfile", os.devnull, "--num_gpus", str(processes)]
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--quiet",
        "--log_level",
        "error",
        *where,
        "--master_port",
        str(port),
        "--no_local_rank",
        "--module",
        RANK_MODULE,
        "pretrain",
        *arguments,
    ]


def deepspeed_environment(device: str) -> dict[str, str]:
    """Environment of the launcher: the CPU accelerator if there is no GPU, and quiet logs."""
    environment = {**os.environ, CHOSEN_PORT: "1"}
    on_cpu = device == "cpu" or (device == "auto" and not Path("/dev/nvidiactl").exists())
    if on_cpu:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    environment.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    environment.setdefault("LOG_LEVEL", "error")
    return environment


def run_deepspeed(
    arguments: Sequence[str],
    restarts: Restarts,
    *,
    processes: int,
    device: str = "auto",
    hostfile: Path | None = None,
) -> int:
    """Start the launcher, forward TERM, USR1, INT and HUP to the ranks, and return the exit code of the run. Lost ranks
    are restarted as `restarts` says, unless a signal has asked the run to end."""
    launchers: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        if signum == signal.SIGHUP:
            leave_lost_terminal()
        if launchers:
            _forward(launchers[-1], signum)

    for signum in caught_signals():
        signal.signal(signum, forward)
    while True:
        command = deepspeed_command(arguments, processes=processes, port=free_port(), hostfile=hostfile)
        launchers.append(subprocess.Popen(command, env=deepspeed_environment(device), start_new_session=True))
        code = launchers[-1].wait()
        ended = exit_code(code) if received else restarts.next_code(code)
        if ended is not None:
            return ended


def rank_processes(parent: int) -> list[psutil.Process]:
    """Descendants of the process `parent` that are ranks of a run."""
    try:
        below = psutil.Process(parent).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process for process in below if _is_rank(process)]


def _is_rank(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[2:5] == ["-m", RANK_MODULE, "pretrain"]
    except psutil.Error:
        return False


def _forward(launcher: subprocess.Popen[bytes], signum: int) -> None:
    """Send the signal to the ranks; if there are none yet, end the launcher."""
    ranks = rank_processes(launcher.pid)
    for process in ranks:
        try:
            process.send_signal(signum)
        except psutil.NoSuchProcess:
            continue
    if not ranks:
        os.killpg(launcher.pid, signal.SIGTERM)
