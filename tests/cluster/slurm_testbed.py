"""A real Slurm for tests: started, queried, harmed and stopped."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from locations import ROOT

TESTBED = ROOT / "slurm" / "testbed"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


def why_not() -> str | None:
    """Why Slurm cannot run on this machine; None if it can."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=path) is None]
    return (
        f"{', '.join(missing)} not installed (apt-get install munge slurmctld slurmd slurm-client)" if missing else None
    )


def run(command: list[str], environment: dict[str, str], *, folder: Path = ROOT, timeout: float = 60) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def run_until(condition: Callable[[], object], job: Job, what: str, limit: float) -> None:
    """Wait until `condition` holds; fail, naming `what`, if the job ends first, or after `limit` seconds."""
    deadline = time.monotonic() + limit
    while True:
        ended = job.state() in ENDED
        for _ in range(10):  # less often than the condition, as asking Slurm costs a process
            if condition():
                return
            assert not ended and time.monotonic() < deadline, (
                f"no {what} {'at its end' if ended else f'in {limit:g} s'}:\n{job.log()}"
            )
            time.sleep(0.1)


class Slowed(threading.Thread):
    """Slows down a rank of a job, without load, until the job saves: however fast the machine, the run does not finish
    before its time limit of a minute."""

    def __init__(self, job: Job) -> None:
        super().__init__(daemon=True)
        self.job = job
        self.start()

    def run(self) -> None:
        """Suspend the rank most of the time."""
        while "saving" not in self.job.log() and self.job.state() not in ENDED:
            for process in list(self.job.ranks())[:1]:
                for _ in range(3):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.suspend()
                        time.sleep(0.2)
                        process.resume()
                        time.sleep(0.1)
            time.sleep(0.1)


class Slurm:
    """A running testbed; jobs run in `folder`, which all its nodes can see."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.bed, self.folder = folder / "slurm", folder
        self.environment = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
        for name in [name for name in self.environment if name.startswith(("SLURM_", "SBATCH_", "GLOO_"))]:
            del self.environment[name]
        run([str(TESTBED / "up.sh"), str(nodes), str(self.bed)], self.environment, timeout=120)
        self.environment |= {"SLURM_CONF": str(self.bed / "slurm.conf"), "PYTHONPATH": str(ROOT)}
        self.environment |= {"EXLM_PYTHON": sys.executable}

    def down(self) -> None:
        """Stop it and everything that runs in it."""
        run([str(TESTBED / "down.sh"), str(self.bed)], self.environment, timeout=120)

    def ask(self, *command: str) -> str:
        """Output of a Slurm command that changes nothing. One that SIGPIPE ends has lost its connection to a busy
        controller before it had the answer: it is asked again, a few times."""
        for _ in range(4):
            try:
                return run(list(command), self.environment)
            except AssertionError as error:
                if f"ended with {-signal.SIGPIPE}:" not in str(error):
                    raise
            time.sleep(1)
        return run(list(command), self.environment)

    def lose(self, job: Job, node: str) -> None:
        """Kill what a power loss of a node kills: the ranks of the job and Slurm's own processes there."""
        ranks = [process for process in job.ranks() if process.environ()["SLURMD_NODENAME"] == node]
        managers = [parent for rank in ranks for parent in rank.parents() if parent.name() == "slurmstepd"]
        daemon = psutil.Process(int((self.bed / "pid" / f"slurmd-{node}").read_text()))
        for process in (daemon, *managers, *ranks):
            process.kill()

    def submit(self, script: Path, *arguments: str, options: list[str], **environment: str) -> Job:
        """`sbatch OPTIONS SCRIPT ARGUMENTS` in the common folder."""
        command = ["sbatch", "--parsable", *options, str(script), *arguments]
        return Job(self, run(command, {**self.environment, **environment}, folder=self.folder).strip())

    def launch(self, *arguments: str) -> Job:
        """`exlm launch slurm ARGUMENTS` in the common folder."""
        command = [sys.executable, "-m", "exlm_dist.cli", "launch", "slurm", *arguments]
        return Job(self, run(command, self.environment, folder=self.folder).split()[-1])


class Job:
    """A submitted job (or task of an array, `12_1`)."""

    def __init__(self, slurm: Slurm, number: str) -> None:
        self.slurm, self.number = slurm, number

    def facts(self) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        words = self.slurm.ask("scontrol", "--oneliner", "show", "job", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.facts()["JobState"]

    @property
    def restarts(self) -> int:
        """Times it was requeued."""
        return int(self.facts()["Restarts"])

    def nodes(self) -> list[str]:
        """Names of its nodes."""
        return self.slurm.ask("scontrol", "show", "hostnames", self.facts()["NodeList"]).split()

    def wait(self, limit: float) -> str:
        """Wait for its end; the final state."""
        deadline = time.monotonic() + limit
        while (state := self.state()) not in ENDED:
            assert time.monotonic() < deadline, f"no end in {limit:g} s:\n{self.log()}"
            time.sleep(0.3)
        return state

    def log(self) -> str:
        """Log of the batch script."""
        return self._log.read_text() if self._log.exists() else ""

    @functools.cached_property
    def _log(self) -> Path:
        return Path(self.facts()["StdOut"])

    def starts(self) -> int:
        """Times its ranks were started."""
        return self.log().count("starting the ranks at step")

    def ranks(self) -> Iterator[psutil.Process]:
        """Processes of its ranks."""
        job_id = self.facts()["JobId"]
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                if (
                    environment.get("SLURM_JOB_ID") == job_id
                    and "pretrain" in process.cmdline()
                    and "RANK" in environment
                ):
                    yield process
            except psutil.Error:
                continue

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank; there must be exactly one process of it."""
        (process,) = [each for each in self.ranks() if each.environ()["RANK"] == str(rank) and "python" in each.name()]
        process.send_signal(number)
