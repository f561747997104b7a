"""Saving a run while it trains: what all ranks do together, and when.

A save copies the numbers a rank owns to memory of its own; its writer takes them from there. The copy is made beside
the next step, which waits for it before it updates them. At every step edge until the files are written the ranks tell
each other how far their writers are. Once all are done, rank 0 has the checkpoint published; if one failed, none is.
One save at a time: the next one waits for the former.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exlm_dist.checkpoint import storage as files
from exlm_dist.checkpoint.pieces import Piece, Shape
from exlm_dist.checkpoint.tensors import model_file, optimizer_file, shape_in_file, tensor_name
from exlm_dist.checkpoint.writer import DISK, LOST, VALUES, InlineWriter, Memory, ProcessWriter, Reply, Writer
from exlm_dist.config.schema import CheckpointConfig
from exlm_dist.launch import heartbeat
from exlm_dist.training.engine import state as checkpoint
from exlm_dist.training.engine.base import Engine
from exlm_dist.utils.errors import EXIT_RETRY, ConfigError, UserError
from exlm_dist.utils.logs import get_logger

logger = get_logger(__name__)
#: Seconds between two looks at the writers while training waits for them.
PAUSE = 0.05


class WriterLost(UserError):
    """The process that writes checkpoints ended or did not answer, and there was no going on without it."""

    exit_code = EXIT_RETRY


@dataclass(frozen=True)
class Saved:
    """How a save ended, the same on every rank."""

    step: int
    folder: Path
    evaluation: dict[str, float] | None
    failure: str | None = None  # why there is no checkpoint
    kind: str = ""  # of the failure: DISK, LOST or VALUES
    removed: tuple[str, ...] = ()
    alarm: str | None = None
    stall: float = 0.0  # seconds that training waited, when it began and for the copy before the next update
    seconds: float = 0.0  # from its beginning until it was published


@dataclass
class _Save:
    """A save under way."""

    step: int
    folder: Path
    temporary: Path
    evaluation: dict[str, float] | None
    started: float
    reply: Reply | None = None  # of this rank's writer, to the job it has now
    publishing: bool = False


class Saver:
    """The saves of one launch. Every method is a collective, called by all ranks in the same order; but `close`."""

    def __init__(
        self, run_folder: Path, engine: Engine, settings: CheckpointConfig, *, config: str, tokenizer: Path, log: Path
    ) -> None:
        """Allocates the memory for the copy and starts the writer. `config`: text of the resolved configuration;
        `tokenizer`: its folder; `log`: of the run, forced to the disk with every checkpoint."""
        self._run_folder, self._engine, self._process, self._settings = run_folder, engine, engine.process, settings
        self._config, self._tokenizer, self._log = config, tokenizer, log
        self._parts = checkpoint.owned(engine)
        self.index = checkpoint.layout(engine, self._parts)
        self._index_text = self.index.as_text() if self._process.is_first else ""
        numel = sum(part.stop - part.start for part in self._parts) * (1 + len(checkpoint.MOMENTS))
        self._memory = self._process.run_everywhere(lambda: Memory(numel * 4))
        # At least one number: torch makes no tensor of none.
        self._numbers = torch.frombuffer(self._memory.bytes, dtype=torch.float32, count=max(numel, 1))
        self._stream: torch.cuda.Stream | None = None
        if self._process.device.type == "cuda":
            self._process.run_everywhere(lambda: _pin(self._numbers))
            self._stream = torch.cuda.Stream(self._process.device)
        self._writer: Writer = (
            ProcessWriter(self._memory, settings.timeout) if settings.asynchronous else InlineWriter(self._memory)
        )
        self._save: _Save | None = None
        #: Seconds that training has waited for the newest save.
        self.stall = 0.0
        self._hook = engine.inner_optimizer.register_step_pre_hook(self._before_update)

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._save is not None

    def start(self, step: int, state: dict[str, Any]) -> Saved | None:
        """Begin to save the state of the engine; None, or why that failed at once. `wait` for the former save first."""
        assert self._save is None
        started = time.perf_counter()
        folder = files.folder_of(self._run_folder, step)
        begun = self._process.broadcast_object(self._begin(folder) if self._process.is_first else None)
        if "failure" in begun:
            return Saved(step, folder, state["evaluation"], begun["failure"], DISK)
        self._save = _Save(step, folder, Path(begun["folder"]), state["evaluation"], started)
        self._writer.submit(self._write_job(state), self._copy())
        self.stall = time.perf_counter() - started
        return None

    def _copy(self) -> Callable[[], None]:
        """What copies the numbers that are there now, as long as no update begins."""
        numbers = checkpoint.sources(self._engine, self._parts)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._process.device))
        return lambda: checkpoint.copy_out(numbers, self._numbers, self._stream)

    def _before_update(self, *_: Any) -> None:
        """Before the optimizer changes any number, however the engine comes to call it."""
        if self._save is not None:
            started = time.perf_counter()
            self._writer.settle()
            self.stall += time.perf_counter() - started

    def _begin(self, folder: Path) -> dict[str, str]:
        needed = sum(piece.numel for pieces in self.index.pieces.values() for piece in pieces) * 4
        try:
            return {"folder": str(files.begin(folder, needed * (1 + len(self.index.moments))))}
        except files.SaveFailed as error:
            return {"failure": str(error)}

    def _write_job(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's pieces; on rank 0 also what belongs to all."""
        job: dict[str, Any] = {
            "kind": "write",
            "folder": str(self._save.temporary),
            "step": self._save.step,
            "tensors": [vars(file) for file in self._tensor_files()],
            "texts": {},
            "copies": {},
            "sync": [],
        }
        if self._process.is_first:
            job["sync"] = [str(self._log)]
            job |= files.small_files(self._index_text, state, self._config, self._tokenizer)
        return job

    def _tensor_files(self) -> list[files.TensorFile]:
        rank = self._process.rank
        shapes: dict[str, Shape] = {
            part.held.name: shape_in_file(part.held.shape, Piece(part.held.slice, part.start, part.stop, rank))
            for part in self._parts
        }
        if not shapes:
            return []
        size = sum(part.stop - part.start for part in self._parts) * 4
        moments = {tensor_name(name, key): shape for key in checkpoint.MOMENTS for name, shape in shapes.items()}
        return [
            files.TensorFile(model_file(rank), shapes, 0, size),
            files.TensorFile(optimizer_file(rank), moments, size, size * len(checkpoint.MOMENTS)),
        ]

    def attend(self) -> Saved | None:
        """Look after a save under way; how it ended, once it has."""
        save = self._save
        if save is None:
            return None
        if save.reply is None:
            save.reply = self._reply(save)
        if self._process.any(save.reply is None):
            return None
        replies = self._process.all_gather_object(save.reply)
        failures = [(rank, reply) for rank, reply in enumerate(replies) if "failure" in reply]
        if failures:
            rank, reply = min(failures, key=lambda failure: failure[1]["kind"] != VALUES)
            return self._ended(failure=f"rank {rank}: {reply['failure']}", kind=reply["kind"])
        if save.publishing:
            return self._ended(removed=tuple(replies[0]["removed"]), alarm=replies[0]["alarm"])
        save.reply, save.publishing = None, True
        if self._process.is_first:
            self._writer.submit(self._publish_job(replies))
        return None

    def _reply(self, save: _Save) -> Reply | None:
        """What this rank's writer has to say of its job; a failure is told at once."""
        if save.publishing and not self._process.is_first:
            return {}
        reply = self._writer.poll()
        if reply and "failure" in reply:
            if save.publishing and reply["kind"] == LOST and files.looks_whole(save.folder):
                return {"removed": [], "alarm": reply["failure"]}  # it was lost after the deed
            logger.error("saving step %d: %s", save.step, reply["failure"])
        return reply

    def _publish_job(self, replies: list[Reply]) -> dict[str, Any]:
        return {
            "kind": "publish",
            "folder": str(self._save.temporary),
            "target": str(self._save.folder),
            "step": self._save.step,
            "files": {name: entry for reply in replies for name, entry in reply["files"].items()},
            "keep": self._settings.keep,
            "best": self._settings.best,
        }

    def _ended(self, **outcome: Any) -> Saved:
        save, self._save = self._save, None
        if self._process.is_first:
            shutil.rmtree(save.temporary, ignore_errors=True)
        seconds = time.perf_counter() - save.started
        return Saved(save.step, save.folder, save.evaluation, stall=self.stall, seconds=seconds, **outcome)

    def wait(self) -> Saved | None:
        """Wait for the end of a save under way. Bounded: a writer has `checkpoint.timeout` for each of its two jobs."""
        while self._save is not None:
            heartbeat.alive()  # the writer has a limit of its own
            if (saved := self.attend()) is not None:
                return saved
            if self._save.reply is None:
                time.sleep(PAUSE)
        return None

    def close(self) -> None:
        """End the writer; a save under way is not published."""
        self._hook.remove()
        self._writer.close()
        if self._stream is not None:
            torch.cuda.cudart().cudaHostUnregister(self._numbers.data_ptr())  # may fail, after an error of the GPU
        self._memory.close()


def _pin(numbers: torch.Tensor) -> None:
    """Let the GPU write to memory that is shared with another process; without this every copy goes through a buffer of
    the driver, and the thread that asks for it waits. ConfigError."""
    failed = int(torch.cuda.cudart().cudaHostRegister(numbers.data_ptr(), numbers.nbytes, 0))
    if failed:
        raise ConfigError(
            f"the memory that a checkpoint is written from ({numbers.nbytes / 1e6:.0f} MB) cannot be pinned for the "
            f"GPU (CUDA error {failed}). Give the job more memory, or more ranks."
        )
