"""Saving a run while it trains: what all ranks do in step with one another, and when.

A save copies the elements that a rank owns to memory of its own; its writer takes them from there. The copy runs beside
the next training step, whose update waits for it. At every step edge until the files are written the ranks tell each
other how far their writers are. Once all are done, rank 0 has the checkpoint published; if one failed, none is. One
save at a time: the next one waits for the former.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exlm_dist.checkpoint import rank_files, storage
from exlm_dist.checkpoint.messages import (
    Failed,
    Failure,
    Outcome,
    Published,
    PublishJob,
    WriteJob,
    Written,
    outcome_from_json,
    to_json,
)
from exlm_dist.checkpoint.pieces import Piece, Shape
from exlm_dist.checkpoint.tensors import BYTES_PER_PARAMETER, model_file, optimizer_file, shape_in_file, tensor_name
from exlm_dist.checkpoint.writer import InlineWriter, Memory, ProcessWriter, Writer
from exlm_dist.config.schema import CheckpointConfig
from exlm_dist.launch import heartbeat
from exlm_dist.training.engine import state as checkpoint
from exlm_dist.training.engine.base import Engine
from exlm_dist.utils.checkpoint_names import checkpoint_folder
from exlm_dist.utils.errors import EXIT_RETRY, ConfigError, UserError
from exlm_dist.utils.logs import get_logger

logger = get_logger(__name__)
#: Seconds between two looks at the writers while training waits for them.
PAUSE = 0.05


class WriterLost(UserError):
    """The process that writes checkpoints ended or did not answer, and the run cannot go on without this one."""

    exit_code = EXIT_RETRY


@dataclass(frozen=True)
class Saved:
    """How a save ended, the same on every rank."""

    step: int
    folder: Path
    evaluation: dict[str, float] | None
    outcome: Published | Failed
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
    outcome: Outcome | None = None  # of the job that this rank's writer has now
    publishing: bool = False


class Saver:
    """The saves of one launch. Every method but `close` is a collective, called by all ranks in the same order."""

    def __init__(
        self, run_folder: Path, engine: Engine, settings: CheckpointConfig, *, config: str, tokenizer: Path, log: Path
    ) -> None:
        """Allocates the memory for the copy and starts the writer. `config`: text of the resolved configuration;
        `tokenizer`: its folder; `log`: of the run, forced to the disk with every checkpoint."""
        self._run_folder, self._engine, self._process, self._settings = run_folder, engine, engine.process, settings
        self._config, self._tokenizer, self._log = config, tokenizer, log
        self._parts = checkpoint.owned_ranges(engine)
        self.index = checkpoint.gather_index(engine, self._parts)
        self._index_text = self.index.as_text() if self._process.is_first else ""
        numel = sum(part.numel for part in self._parts) * (1 + len(checkpoint.MOMENTS))
        self._memory = self._process.run_everywhere(lambda: Memory(numel * 4))
        # At least one element: torch makes no tensor of none.
        self._copy = torch.frombuffer(self._memory.bytes, dtype=torch.float32, count=max(numel, 1))
        self._stream: torch.cuda.Stream | None = None
        if self._process.device.type == "cuda":
            self._process.run_everywhere(lambda: _pin(self._copy))
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
        folder = checkpoint_folder(self._run_folder, step)
        temporary, failure = self._process.broadcast_object(self._begin(folder) if self._process.is_first else None)
        if failure is not None:
            return Saved(step, folder, state["evaluation"], Failed(Failure.DISK, failure))
        self._save = _Save(step, folder, Path(temporary), state["evaluation"], started)
        self._writer.submit(self._write_job(self._save, state), self._fill())
        self.stall = time.perf_counter() - started
        return None

    def _begin(self, folder: Path) -> tuple[str | None, str | None]:
        """(temporary folder, None) or (None, failure)."""
        numel = sum(piece.numel for pieces in self.index.pieces.values() for piece in pieces)
        try:
            return str(storage.begin(folder, numel * BYTES_PER_PARAMETER)), None
        except rank_files.SaveFailed as error:
            return None, str(error)

    def _fill(self) -> Callable[[], None]:
        """What copies the elements of this moment; it must be done before the next update begins."""
        tensors = checkpoint.owned_tensors(self._engine, self._parts)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._process.device))
        return lambda: checkpoint.copy_out(tensors, self._copy, self._stream)

    def _before_update(self, *_: Any) -> None:
        """Before the optimizer changes any element, however DeepSpeed comes to call it."""
        if self._save is not None:
            started = time.perf_counter()
            self._writer.settle()
            self.stall += time.perf_counter() - started

    def _write_job(self, save: _Save, state: Mapping[str, Any]) -> WriteJob:
        """This rank's pieces; on rank 0 also what there is once per checkpoint."""
        small, sync = rank_files.SmallFiles(), []
        if self._process.is_first:
            small = rank_files.SmallFiles.of_run(self._index_text, state, self._config, self._tokenizer)
            sync = [str(self._log)]
        return WriteJob(str(save.temporary), save.step, self._tensor_files(), small, sync)

    def _tensor_files(self) -> list[rank_files.TensorFile]:
        rank = self._process.rank
        shapes: dict[str, Shape] = {}
        for part in self._parts:
            piece = Piece(part.sharded.slice, part.start, part.stop, rank)
            shapes[part.sharded.name] = shape_in_file(part.sharded.shape, piece)
        if not shapes:
            return []
        size = sum(part.numel for part in self._parts) * 4
        moments = {tensor_name(name, key): shape for key in checkpoint.MOMENTS for name, shape in shapes.items()}
        return [
            rank_files.TensorFile(model_file(rank), shapes, 0, size),
            rank_files.TensorFile(optimizer_file(rank), moments, size, size * len(checkpoint.MOMENTS)),
        ]

    def attend(self) -> Saved | None:
        """See to a save under way; how it ended, once it has."""
        save = self._save
        if save is None:
            return None
        if save.outcome is None:
            save.outcome = self._outcome(save)
        if self._process.any(save.outcome is None):
            return None
        assert save.outcome is not None  # nor is that of any other rank
        outcomes = [outcome_from_json(text) for text in self._process.all_gather_object(to_json(save.outcome))]
        failures = [(rank, outcome) for rank, outcome in enumerate(outcomes) if isinstance(outcome, Failed)]
        if failures:
            rank, failed = min(failures, key=lambda failure: failure[1].kind is not Failure.VALUES)
            return self._ended(save, Failed(failed.kind, f"rank {rank}: {failed.why}"))
        if isinstance(outcomes[0], Published):
            return self._ended(save, outcomes[0])
        save.outcome, save.publishing = None, True
        if self._process.is_first:
            self._writer.submit(self._publish_job(save, outcomes))
        return None

    def _outcome(self, save: _Save) -> Outcome | None:
        """Of the job that this rank's writer has now; a failure is logged at once."""
        if save.publishing and not self._process.is_first:
            return Published([])
        outcome = self._writer.poll()
        if isinstance(outcome, Failed):
            if save.publishing and outcome.kind is Failure.LOST and storage.looks_whole(save.folder):
                return Published([], alarm=outcome.why)  # lost after the publication
            logger.error("saving step %d: %s", save.step, outcome.why)
        return outcome

    def _publish_job(self, save: _Save, outcomes: list[Outcome]) -> PublishJob:
        files = {
            name: entry for outcome in outcomes if isinstance(outcome, Written) for name, entry in outcome.files.items()
        }
        settings = self._settings
        return PublishJob(str(save.temporary), str(save.folder), save.step, files, settings.keep, settings.best)

    def _ended(self, save: _Save, outcome: Published | Failed) -> Saved:
        self._save = None
        if self._process.is_first:
            shutil.rmtree(save.temporary, ignore_errors=True)
        seconds = time.perf_counter() - save.started
        return Saved(save.step, save.folder, save.evaluation, outcome, self.stall, seconds)

    def wait(self) -> Saved | None:
        """Wait for the end of a save under way. Bounded: a writer has `checkpoint.timeout` for each of its two jobs."""
        while self._save is not None:
            heartbeat.alive()  # the writer has a limit of its own
            if (saved := self.attend()) is not None:
                return saved
            if self._save.outcome is None:
                time.sleep(PAUSE)
        return None

    def close(self) -> None:
        """End the writer; a save under way is not published."""
        self._hook.remove()
        self._writer.close()
        if self._stream is not None:
            torch.cuda.cudart().cudaHostUnregister(self._copy.data_ptr())  # may fail, after an error of the GPU
        self._memory.close()


def _pin(memory: torch.Tensor) -> None:
    """Let the GPU write to memory that another process has mapped too. Without this every copy passes through a buffer
    of the driver, and the thread that asks for it waits. ConfigError."""
    failed = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if failed:
        raise ConfigError(
            f"the memory that a checkpoint is written from ({memory.nbytes / 1e6:.0f} MB) cannot be pinned for the "
            f"GPU (CUDA error {failed}). Give the job more memory, or more ranks."
        )
