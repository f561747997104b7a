"""The process beside each rank that hashes and writes its part of a checkpoint while training goes on. No torch in it.

The elements are in memory that both have mapped (`Memory`: it has no name, so nothing of it is left whatever ends the
two). A thread of the rank copies them there and then hands the job over. A job is JSON in memory of the same kind; a
line through a pipe says how long it is, a line comes back with the outcome (`exlm_dist.checkpoint.messages`). The
process ends with its parent (also by SIGKILL) and has the signals blocked that ask a run to save and end.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import exlm_dist
from exlm_dist.checkpoint import rank_files, storage
from exlm_dist.checkpoint.messages import (
    Failed,
    Failure,
    Job,
    Outcome,
    Published,
    PublishJob,
    WriteJob,
    Written,
    job_from_json,
    outcome_from_json,
    to_json,
)
from exlm_dist.utils.errors import CheckpointError, ConfigError
from exlm_dist.utils.files import sync_path
from exlm_dist.utils.signals import SIGNALS, die_with_parent

#: Copies the elements of a job into the memory.
Fill = Callable[[], None]


class Memory:
    """Bytes that a child process can map too; allocated at once, and freed when the last process with them has gone."""

    def __init__(self, size: int) -> None:
        """`size`: bytes. ConfigError when there is not that much."""
        self.handle = os.memfd_create("exlm-checkpoint")
        size = max(size, mmap.PAGESIZE)
        try:
            os.posix_fallocate(self.handle, 0, size)
        except OSError as error:
            raise ConfigError(
                f"no memory for the copy that a checkpoint is written from ({size / 1e6:.0f} MB): {error.strerror}. "
                "Give the job more memory, or more ranks."
            ) from error
        self.bytes = mmap.mmap(self.handle, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)

    def close(self) -> None:
        """Release this process's handle; views of `bytes` stay usable and keep the memory until they are gone."""
        os.close(self.handle)


class Writer(Protocol):
    """Takes one job at a time and answers it later."""

    def submit(self, job: Job, fill: Fill | None = None) -> None:
        """Begin a job, after `fill`. That may run in a thread: until `settle` what it reads must not change."""

    def settle(self) -> None:
        """Wait until `fill` is done, and raise what it has raised."""

    def poll(self) -> Outcome | None:
        """The outcome of the job, once; None until it is there."""

    def close(self) -> None:
        """End, whatever is under way."""


class InlineWriter:
    """Does the job in this process while `submit` waits."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._outcome: Outcome | None = None

    def submit(self, job: Job, fill: Fill | None = None) -> None:
        """As in `Writer`."""
        if fill is not None:
            fill()
        self._outcome = run_job(job, self._memory.bytes)

    def settle(self) -> None:
        """As in `Writer`: `submit` has waited."""

    def poll(self) -> Outcome | None:
        """As in `Writer`."""
        outcome, self._outcome = self._outcome, None
        return outcome

    def close(self) -> None:
        """As in `Writer`."""


class ProcessWriter:
    """Has the job done by a child process, which is started at once, and again when it has died."""

    def __init__(self, memory: Memory, timeout: float) -> None:
        """`timeout`: seconds after which a job counts as failed and the process is ended."""
        self._memory, self._timeout = memory, timeout
        self._jobs = os.memfd_create("exlm-checkpoint-job")
        self._start()
        self._deadline = 0.0
        self._received = b""
        self._filler = ThreadPoolExecutor(1, "checkpoint-copy")
        self._filling: Future[None] | None = None

    def _start(self) -> None:
        root = str(Path(exlm_dist.__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        handles = (self._memory.handle, self._jobs)
        arguments = [str(number) for number in (os.getpid(), *handles)]
        # A signal that is blocked here stays blocked in the child: it finishes the save that the signal asks for.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=handles,
                env={**os.environ, "PYTHONPATH": path},
                bufsize=0,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert self._process.stdin is not None and self._process.stdout is not None  # both are pipes
        self._to_process, self._from_process = self._process.stdin, self._process.stdout
        os.set_blocking(self._from_process.fileno(), False)

    @property
    def pid(self) -> int:
        """Of the child process."""
        return self._process.pid

    def submit(self, job: Job, fill: Fill | None = None) -> None:
        """As in `Writer`; what goes wrong with the process is in the outcome."""
        self.settle()
        # In this thread: a child ends with the thread that has started it.
        if self._process.poll() is not None:
            self._end()
            self._start()
        text = to_json(job).encode()
        os.ftruncate(self._jobs, 0)
        os.pwrite(self._jobs, text, 0)
        self._received, self._deadline = b"", time.monotonic() + self._timeout
        if fill is None:
            self._hand_over(len(text))
        else:
            self._filling = self._filler.submit(self._fill_and_hand_over, fill, len(text))

    def _fill_and_hand_over(self, fill: Fill, length: int) -> None:
        """In the thread; until it is done no other touches the process."""
        fill()
        self._hand_over(length)

    def _hand_over(self, length: int) -> None:
        try:
            self._to_process.write(f"{length}\n".encode())
        except BrokenPipeError:
            pass  # `poll` sees that it has ended, and reports its exit code

    def settle(self) -> None:
        """As in `Writer`."""
        filling, self._filling = self._filling, None
        if filling is not None:
            filling.result()

    def poll(self) -> Outcome | None:
        """As in `Writer`."""
        self.settle()
        handle = self._from_process.fileno()
        while select.select([handle], [], [], 0)[0]:
            part = os.read(handle, 1 << 16)
            if not part:
                return self._lost(f"ended with exit code {self._process.wait()}")
            self._received += part
        if self._received.endswith(b"\n"):
            received, self._received = self._received, b""
            return outcome_from_json(received)
        if time.monotonic() > self._deadline:
            return self._lost(f"did not finish within checkpoint.timeout, {self._timeout:.0f} s")
        return None

    def _lost(self, why: str) -> Failed:
        self._end()
        return Failed(Failure.LOST, f"the process that writes the checkpoint {why}. Older checkpoints are untouched.")

    def close(self) -> None:
        """As in `Writer`. (A process that waits for a job has nothing to lose.)"""
        self._filler.shutdown()
        self._end()
        os.close(self._jobs)

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._to_process.close()
        self._from_process.close()


def run_job(job: Job, memory: Any) -> Outcome:
    """Do a job; `memory`: bytes with the elements of its tensors."""
    try:
        return _write(job, memory) if isinstance(job, WriteJob) else _publish(job)
    except (CheckpointError, OSError) as error:
        return Failed(Failure.DISK, str(error))


def _write(job: WriteJob, memory: Any) -> Outcome:
    for file in job.tensors[:1]:  # the parameters
        if (broken := rank_files.not_finite(file, memory)) is not None:
            why = (
                f"parameter {broken} is not finite after step {job.step}; it was not saved. "
                "Lower optimizer.lr or set optimizer.clip."
            )
            return Failed(Failure.VALUES, why)
    for path in job.sync:
        sync_path(Path(path))
    return Written(rank_files.write_files(Path(job.folder), job.tensors, memory, job.small))


def _publish(job: PublishJob) -> Outcome:
    target = Path(job.target)
    storage.publish(Path(job.folder), target, job.step, job.files)
    try:
        removed = storage.retain(target.parent.parent, job.keep, job.best)
    except (CheckpointError, OSError) as error:
        return Published([], f"older checkpoints could not be removed: {error}")
    return Published([path.name for path in removed])


def main(parent: int, memory: int, jobs: int) -> None:
    """The loop of the child process. Ends when the pipe is closed, or with the parent."""
    die_with_parent()
    if os.getppid() != parent:
        return  # it died before the line above
    os.nice(10)  # a training step goes first
    with mmap.mmap(memory, 0, prot=mmap.PROT_READ) as elements:
        for line in sys.stdin:
            outcome = run_job(job_from_json(os.pread(jobs, int(line), 0)), elements)
            sys.stdout.write(to_json(outcome) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
