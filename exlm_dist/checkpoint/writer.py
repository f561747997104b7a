"""The process beside each rank that hashes and writes its part of a checkpoint while training goes on. No torch in it.

The numbers are in memory that both share (`Memory`: it has no name, so whatever ends the two, nothing of it is left).
A thread of the rank puts them there and then gives the job away. A job is JSON in memory shared in the same way; a line
through a pipe says how long it is, a line comes back with the outcome. The process ends with its parent (also by
SIGKILL) and has the signals blocked that ask a run to save and end.
"""

from __future__ import annotations

import ctypes
import json
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
from exlm_dist.checkpoint import storage as files
from exlm_dist.utils.errors import CheckpointError, ConfigError
from exlm_dist.utils.files import sync_path
from exlm_dist.utils.signals import SIGNALS

Job = dict[str, Any]
Reply = dict[str, Any]
#: Puts the numbers of a job into the memory.
Fill = Callable[[], None]
_PR_SET_PDEATHSIG = 1
#: What has failed: writing, the process that writes, or the training (a parameter is not finite).
DISK, LOST, VALUES = "disk", "lost", "values"


class Memory:
    """Bytes that a child process may share; they are allocated at once and go with the last process that has them."""

    def __init__(self, size: int) -> None:
        """ConfigError when there is not that much."""
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
        """Give this process's share back; views of `bytes` stay usable until they are gone too."""
        os.close(self.handle)


class Writer(Protocol):
    """Takes one job at a time and answers it later."""

    def submit(self, job: Job, fill: Fill | None = None) -> None:
        """Begin a job, after `fill`. That may run in a thread: until `settle` what it reads must stay as it is."""

    def settle(self) -> None:
        """Wait until `fill` is done, and raise what it has raised."""

    def poll(self) -> Reply | None:
        """The outcome of the job, once: `{"files": ...}`, `{"removed": ..., "alarm": ...}` or `{"failure": why, "kind":
        DISK, LOST or VALUES}`."""

    def close(self) -> None:
        """End, whatever is under way."""


class InlineWriter:
    """Does the job in this process while `submit` waits."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._reply: Reply | None = None

    def submit(self, job: Job, fill: Fill | None = None) -> None:
        """As in `Writer`."""
        if fill is not None:
            fill()
        self._reply = run_job(job, self._memory.bytes)

    def settle(self) -> None:
        """As in `Writer`: `submit` has waited."""

    def poll(self) -> Reply | None:
        """As in `Writer`."""
        reply, self._reply = self._reply, None
        return reply

    def close(self) -> None:
        """As in `Writer`."""


class ProcessWriter:
    """Has the job done by a child process, which is started at once and again where it has died."""

    def __init__(self, memory: Memory, timeout: float) -> None:
        """`timeout`: seconds after which a job counts as failed and the process is ended."""
        self._memory, self._timeout = memory, timeout
        self._jobs = os.memfd_create("exlm-checkpoint-job")
        self._process = self._spawn()
        self._deadline = 0.0
        self._received = b""
        self._filler = ThreadPoolExecutor(1, "checkpoint-copy")
        self._filling: Future[None] | None = None

    def _spawn(self) -> subprocess.Popen:
        root = str(Path(exlm_dist.__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        handles = (self._memory.handle, self._jobs)
        arguments = [str(number) for number in (os.getpid(), *handles)]
        # A blocked signal stays blocked in the child: it finishes the save that the signal asks for.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=handles,
                env={**os.environ, "PYTHONPATH": path},
                bufsize=0,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.set_blocking(process.stdout.fileno(), False)
        return process

    @property
    def pid(self) -> int:
        """Of the child process."""
        return self._process.pid

    def submit(self, job: Job, fill: Fill | None = None) -> None:
        """As in `Writer`; what goes wrong with the process is in the reply."""
        self.settle()
        # In this thread: a child is ended together with the thread that has started it.
        if self._process.poll() is not None:
            self._end()
            self._process = self._spawn()
        text = json.dumps(job).encode()
        os.ftruncate(self._jobs, 0)
        os.pwrite(self._jobs, text, 0)
        self._received, self._deadline = b"", time.monotonic() + self._timeout
        if fill is None:
            self._give(len(text))
        else:
            self._filling = self._filler.submit(self._fill_and_give, fill, len(text))

    def _fill_and_give(self, fill: Fill, length: int) -> None:
        """In the thread; until it is done no other touches the process."""
        fill()
        self._give(length)

    def _give(self, length: int) -> None:
        try:
            self._process.stdin.write(f"{length}\n".encode())
        except BrokenPipeError:
            pass  # its end is seen, and its exit code told, by `poll`

    def settle(self) -> None:
        """As in `Writer`."""
        filling, self._filling = self._filling, None
        if filling is not None:
            filling.result()

    def poll(self) -> Reply | None:
        """As in `Writer`."""
        self.settle()
        handle = self._process.stdout.fileno()
        while select.select([handle], [], [], 0)[0]:
            part = os.read(handle, 1 << 16)
            if not part:
                return self._lost(f"ended with exit code {self._process.wait()}")
            self._received += part
        if self._received.endswith(b"\n"):
            received, self._received = self._received, b""
            return json.loads(received)
        if time.monotonic() > self._deadline:
            return self._lost(f"did not finish within checkpoint.timeout, {self._timeout:.0f} s")
        return None

    def _lost(self, why: str) -> Reply:
        self._end()
        failure = f"the process that writes the checkpoint {why}. Older checkpoints are untouched."
        return {"failure": failure, "kind": LOST}

    def close(self) -> None:
        """As in `Writer`. (A process that waits for a job has nothing to lose.)"""
        self._filler.shutdown()
        self._end()
        os.close(self._jobs)

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


def run_job(job: Job, memory: Any) -> Reply:
    """Write one rank's files, or publish the checkpoint and thin out the older ones."""
    try:
        if job["kind"] == "write":
            return _write(job, memory)
        target = Path(job["target"])
        files.publish(Path(job["folder"]), target, job["step"], job["files"])
    except (CheckpointError, OSError) as error:
        return {"failure": str(error), "kind": DISK}
    try:
        removed = files.retain(target.parent.parent, job["keep"], job["best"])
        return {"removed": [path.name for path in removed], "alarm": None}
    except OSError as error:
        return {"removed": [], "alarm": f"older checkpoints could not be removed: {error}"}


def _write(job: Job, memory: Any) -> Reply:
    tensors = [files.TensorFile(**file) for file in job["tensors"]]
    for file in tensors[:1]:  # the parameters
        if (broken := files.not_finite(file, memory)) is not None:
            why = (
                f"parameter {broken} is not finite after step {job['step']}; it was not saved. "
                "Lower optimizer.lr or set optimizer.clip, and go on from an older checkpoint."
            )
            return {"failure": why, "kind": VALUES}
    for path in job["sync"]:
        sync_path(Path(path))
    return {"files": files.write_files(Path(job["folder"]), tensors, memory, job["texts"], job["copies"])}


def main(parent: int, memory: int, jobs: int) -> None:
    """The loop of the child process. Ends when the pipe is closed, or with the parent."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return  # it died before the line above
    os.nice(10)  # a training step goes first
    with mmap.mmap(memory, 0, prot=mmap.PROT_READ) as numbers:
        for line in sys.stdin:
            reply = run_job(json.loads(os.pread(jobs, int(line), 0)), numbers)
            sys.stdout.write(json.dumps(reply) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
