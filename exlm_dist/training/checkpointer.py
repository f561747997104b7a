"""When a run is saved, what its checkpoints say of it, and what a save that failed means for the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exlm_dist.checkpoint import rank_files, reader, storage
from exlm_dist.checkpoint.messages import Failed, Failure, Published
from exlm_dist.checkpoint.tensors import BYTES_PER_PARAMETER
from exlm_dist.config import RunConfig, dump_config
from exlm_dist.parallel.process import Process
from exlm_dist.tracking import EventLog
from exlm_dist.training import provenance
from exlm_dist.training.engine import state as engine_state
from exlm_dist.training.engine.base import Engine
from exlm_dist.training.evaluator import valid_metrics
from exlm_dist.training.observers import Meter
from exlm_dist.training.saver import Saved, Saver, WriterLost
from exlm_dist.training.starting_point import StartingPoint, fingerprints
from exlm_dist.utils.errors import Diverged
from exlm_dist.utils.logs import get_logger
from exlm_dist.utils.version import git_commit

#: What is raised for a save that failed where the run cannot go on without it.
SAVE_ERRORS = {Failure.DISK: rank_files.SaveFailed, Failure.LOST: WriterLost, Failure.VALUES: Diverged}
#: Bytes per second that each rank writes to a slow shared file system, hashing included.
SLOWEST_WRITE = 100e6
logger = get_logger(__name__)


class Checkpointer:
    """The checkpoints of one launch. Every method is a collective but `is_due` and `seconds_to_save`."""

    def __init__(
        self,
        config: RunConfig,
        process: Process,
        start: StartingPoint,
        engine: Engine,
        saver: Saver,
        meter: Meter,
        init: dict[str, Any] | None,
    ) -> None:
        """`init`: of `state.json`, what the run took its first weights from; None: initial weights."""
        self._config, self._process, self._engine, self.saver, self._meter = config, process, engine, saver, meter
        self._run_folder = start.path
        self._events: EventLog | None = meter.events
        self._slowest_save = 0.0
        self._about = {**_about(config, process, engine, fingerprints(start.train_data)), "changes": start.changes}
        if init is not None:
            self._about["init"] = init

    @property
    def saving(self) -> bool:
        """Whether a save is under way."""
        return self.saver.busy

    def is_due(self, step: int) -> bool:
        """After every `checkpoint.every` steps and after the last one."""
        return step % self._config.checkpoint.every == 0 or step == self._config.schedule.steps

    def seconds_to_save(self, *, due: bool) -> float:
        """Seconds until the state after the next step could be on disk, that step not counted; `due`: a save comes
        before. As the slowest save of this launch; before there was one, as on a slow file system, to which every
        rank writes its part."""
        guess = BYTES_PER_PARAMETER * self._engine.num_parameters / (SLOWEST_WRITE * self._process.world)
        return (self._slowest_save or guess) * (2 if due or self.saving else 1)

    def save(self, step: int, evaluation: dict[str, float] | None, *, needed: bool = False) -> None:
        """Save the state after `step` steps: begin it, or where it is `needed` or `checkpoint.asynchronous` is off,
        finish it.

        A save that fails is only an alarm while an older checkpoint is there, unless this one is `needed`; else
        SaveFailed or WriterLost, on every rank. Diverged, as soon as it is seen, where a parameter is not finite.
        """
        self._meter.judge()
        with self._meter.pause():
            self._conclude(self.saver.wait(), needed=False)
            failed = self.saver.start(step, self.state(step, evaluation))
            if failed or needed or not self._config.checkpoint.asynchronous:
                self._conclude(failed or self.saver.wait(), needed)

    def attend(self) -> None:
        """At a step edge: see whether a save under way is done."""
        self._conclude(self.saver.attend(), needed=False)

    def finish(self) -> None:
        """Wait for a save under way where the run stops for another reason; one that failed is in the log."""
        saved = self.saver.wait()
        if saved is not None and isinstance(saved.outcome, Published) and self._events is not None:
            self._report(saved, self._events)

    def log_evaluation(self, folder: Path, step: int, evaluation: dict[str, float] | None) -> None:
        """Log the evaluation of a checkpoint as a child run that names the checkpoint; a second time does nothing."""
        if self._events is not None and evaluation is not None:
            tags = {"split": "valid", "tokens": int(evaluation["tokens"]), **reader.reference(folder)}
            self._events.child_run("evaluation", step, valid_metrics(evaluation), tags)

    def state(self, step: int, evaluation: dict[str, float] | None) -> dict[str, Any]:
        """`state.json` of a checkpoint after `step` steps."""
        changing = {"step": step, "evaluation": evaluation, "progress": vars(self._meter.progress)}
        return {**self._about, **changing, **engine_state.scalars(self._engine)}

    def _conclude(self, saved: Saved | None, needed: bool) -> None:
        if saved is None:
            return
        self._slowest_save = max(self._slowest_save, saved.seconds)
        if isinstance(failed := saved.outcome, Failed):
            older = self._process.run_on_first_rank(lambda: storage.has_whole(self._run_folder))
            if needed or not older or failed.kind is Failure.VALUES:
                raise SAVE_ERRORS[failed.kind](f"step {saved.step} was not saved: {failed.why}")
        if self._events is not None:
            self._report(saved, self._events)

    def _report(self, saved: Saved, events: EventLog) -> None:
        if isinstance(outcome := saved.outcome, Failed):
            logger.error("step %d was not saved: %s Training goes on.", saved.step, outcome.why)
            events.tags({f"save_failed_step_{saved.step}": outcome.why})
            return
        self.log_evaluation(saved.folder, saved.step, saved.evaluation)
        events.metrics(saved.step, {"checkpoint/stall_seconds": saved.stall, "checkpoint/seconds": saved.seconds})
        if outcome.alarm:
            logger.error("%s", outcome.alarm)
        removed = f"; removed {', '.join(outcome.removed)}" if outcome.removed else ""
        logger.info(
            "step %d saved in %.1f s, training waited %.2f s%s", saved.step, saved.seconds, saved.stall, removed
        )


def _about(config: RunConfig, process: Process, engine: Engine, data: dict[str, str]) -> dict[str, Any]:
    """What every checkpoint of a launch says alike."""
    return {
        "seed": config.seed,
        **data,
        "config_hash": provenance.config_hash(dump_config(config)),
        "versions": provenance.versions(),
        "git_commit": git_commit(),
        "parameters": engine.num_parameters,
        "layout": {
            "world": process.world,
            "tensor": config.parallel.tensor,
            "pipeline": config.parallel.pipeline,
            "zero": engine.zero,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "micro": config.batch.micro,
            "device": process.device.type,
        },
    }
