"""A run while it is being trained: everything it holds open, and its three actions (step, evaluate, save)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from exlm_dist.checkpoint import reader
from exlm_dist.checkpoint import storage as checkpoint_files
from exlm_dist.checkpoint.messages import Failed, Failure
from exlm_dist.checkpoint.tensors import BYTES_PER_PARAMETER, TensorReader
from exlm_dist.config import RunConfig, check_vocabulary, check_world, config_difference, dump_config
from exlm_dist.data.loader import Loader, eval_batches
from exlm_dist.data.shards import ShardDataset
from exlm_dist.launch import heartbeat
from exlm_dist.model.scoring import Totals
from exlm_dist.parallel.process import Process
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.tracking import EVENTS, EventLog, Tracker
from exlm_dist.training import provenance
from exlm_dist.training.engine import build_engine
from exlm_dist.training.engine import state as checkpoint
from exlm_dist.training.engine.base import Engine
from exlm_dist.training.engine.deepspeed_config import working_dtype
from exlm_dist.training.observers import Meter, Progress
from exlm_dist.training.run_folder import LOCK_PATIENCE, RunFolder, difference_table
from exlm_dist.training.sample_log import SampleLog
from exlm_dist.training.saver import Saved, Saver, WriterLost
from exlm_dist.training.step import optimizer_step
from exlm_dist.utils.errors import CheckpointError, RunStopped
from exlm_dist.utils.logs import get_logger

#: Seconds that sending the last events to MLflow may take at the end of a launch, by how it ended.
SENDING = {"FINISHED": 30.0, "KILLED": 5.0, "FAILED": 3.0}
SAVE_ERRORS = {Failure.DISK: checkpoint_files.SaveFailed, Failure.LOST: WriterLost, Failure.VALUES: RunStopped}
#: Bytes per second of a slow shared file system, hashing included.
SLOWEST_WRITE = 100e6
logger = get_logger(__name__)


class Session:
    """One launch of a run, from its opened folder to its end. `close` always; all ranks call everything in the same
    order."""

    def __init__(self, config: RunConfig, process: Process) -> None:
        self.config, self.process = config, process
        self._config_text = dump_config(config)
        self._folder: RunFolder | None = None
        self._events: EventLog | None = None
        self._tracker: Tracker | None = None
        self._loader: Loader | None = None
        self._samples: SampleLog | None = None
        self._saver: Saver | None = None
        self.engine: Engine | None = None
        self.step = 0
        self._slowest_save = 0.0
        self.evaluation: dict[str, float] | None = None  # of the current step

    def open(self) -> bool:
        """Lock the folder, find where to go on and build everything. False: the run is finished, there is nothing to
        do."""
        config, process = self.config, self.process
        process.run_everywhere(self._check_settings)
        self.path = Path(process.run_on_first_rank(self._open_folder))
        self.train_data = process.run_everywhere(lambda: self._dataset("train"))
        self.valid_data = (
            process.run_everywhere(lambda: self._dataset("valid"))
            if self.train_data.manifest["splits"]["valid"]["shards"]
            else None
        )
        check_vocabulary(self.train_data.vocab_size, config.parallel.tensor)
        self.tokenizer = load_tokenizer(self.train_data.tokenizer_path)
        found = checkpoint.select(self.path, process)
        state = found[1] if found else {"step": 0, "progress": {}}
        if found:
            process.run_everywhere(lambda: self._check_origin(*found))
        self.step, self.evaluation = state["step"], state.get("evaluation")
        if self.step >= config.schedule.steps:
            return False
        self._loader = process.run_everywhere(self._make_loader)
        length = float(self.train_data.lengths.mean()) + 2
        self.engine = build_engine(config, process, self.train_data.vocab_size, length)
        self._saver = Saver(
            self.path,
            self.engine,
            config.checkpoint,
            config=self._config_text,
            tokenizer=self.train_data.tokenizer_path,
            log=self.path / EVENTS,
        )
        if found:
            self._resume(*found)
        progress = Progress(**state["progress"])
        if process.is_first:
            self._events = EventLog(self.path / EVENTS)
            if found:
                # The launch that wrote it may have been killed before it could say so.
                self._log_checkpoint(found[0], self.step, self.evaluation)
            self._tracker = Tracker.start(self.path, config, self._events)
        if config.tracking.samples and process.grid.reports_metrics:
            self._samples = SampleLog(self.path, process.grid.data.rank, process.grid.data.size)
        self.meter = Meter(config, process, self._events, progress)
        logger.info(
            "%s: %s step %d of %d, %.1f M parameters, tensor %d x pipeline %d x data %d ranks, "
            "%d micro-batches of %d on each, ZeRO %d, %s on %s",
            config.name,
            "continuing after" if found else "starting at",
            self.step,
            config.schedule.steps,
            self.engine.num_parameters / 1e6,
            config.parallel.tensor,
            config.parallel.pipeline,
            process.grid.data.size,
            self.engine.accumulation,
            config.batch.micro,
            self.engine.zero,
            str(self.engine.dtype).removeprefix("torch."),
            process.device.type,
        )
        return True

    def _check_settings(self) -> None:
        """What the configuration asks of this world and device. Together: a rank that left at once would take the
        others for lost, which may still be on their way here."""
        check_world(self.config, self.process.world)
        working_dtype(self.config, self.process.device)

    def _open_folder(self) -> str:
        self._folder = RunFolder.open(self.config, patience=min(LOCK_PATIENCE, self.config.launch.timeout / 2))
        checkpoint_files.clean(self._folder.path)
        return str(self._folder.path)

    def _dataset(self, split: str) -> ShardDataset:
        return ShardDataset.open(self.config.data.path, split, max_bad_records=self.config.data.max_bad_records)

    def _check_origin(self, folder: Path, state: dict[str, Any]) -> None:
        """CheckpointError when the checkpoint belongs to other data, another tokenizer or other settings."""
        for what, here in self._fingerprints().items():
            if state[what] != here:
                raise CheckpointError(
                    f"{folder} was trained with {what.replace('_', ' ')} {state[what]}, "
                    f"but {self.config.data.path} has {here}. "
                    "Give the path of the data it was trained on, or give the new run another `name`."
                )
        different = config_difference(reader.read_config(folder), self.config)
        if different:
            raise CheckpointError(
                f"{folder} was written with other settings:\n{difference_table(different)}\n"
                "Give the new run another `name`."
            )

    def _fingerprints(self) -> dict[str, str]:
        return {"data_fingerprint": self.train_data.fingerprint, "tokenizer_fingerprint": self.tokenizer.fingerprint}

    def _make_loader(self) -> Loader:
        config = self.config
        return Loader(
            self.train_data,
            seed=config.seed,
            global_batch=config.batch.sequences,
            prefetch=config.data.prefetch,
            **self._packing(),
        )

    def _packing(self) -> dict[str, Any]:
        config, data = self.config, self.process.grid.data
        return {
            "masking": config.masking,
            "states": config.model.states,
            "anchors": config.model.anchors,
            "micro": config.batch.micro,
            "max_positions": config.model.max_positions,
            "bucket": config.data.bucket,
            "vocab_size": self.train_data.vocab_size,
            "rank": data.rank,
            "world": data.size,
        }

    def _resume(self, folder: Path, state: dict[str, Any]) -> None:
        tensors = self.process.run_everywhere(lambda: TensorReader(folder))
        self.process.run_everywhere(lambda: checkpoint.check_index(self._saver.index, tensors.index))
        self.engine.prime(self._loader.step(self.step).micro_batches)
        checkpoint.restore(self.engine, tensors, state)

    def train_step(self) -> None:
        """One optimizer step."""
        batches = self._loader.step(self.step)
        heartbeat.beat(self.step)
        result = optimizer_step(self.engine, batches, self.config, scored=self.meter.is_logged(self.step))
        self.step += 1
        heartbeat.beat(self.step)
        self.evaluation = None
        if self._samples is not None:
            self._samples.write(result)
        self.meter.after_step(result)

    def evaluation_is_due(self) -> bool:
        """After every `evaluation.every` steps and after the last one, where there is a held-out split."""
        every, last = self.config.evaluation.every, self.step == self.config.schedule.steps
        return self.valid_data is not None and (last or (every > 0 and self.step % every == 0))

    def save_is_due(self) -> bool:
        """After every `checkpoint.every` steps and after the last one."""
        return self.step % self.config.checkpoint.every == 0 or self.step == self.config.schedule.steps

    def evaluate(self) -> None:
        """nll and accuracy per masked token on the held-out split; all ranks take part."""
        with self.meter.pause():
            batches = eval_batches(self.valid_data, sequences=self.config.evaluation.sequences, **self._packing())
            mine = self.engine.evaluate(heartbeat.keep_alive(batches))
            sums = self.process.all_gather([mine.nll, mine.correct, mine.count]).sum(0).tolist()
            self.evaluation = Totals(*sums).means()
        if self._events is not None:
            values = _valid_metrics(self.evaluation)
            self._events.metrics(self.step, values)
            logger.info(
                "step %d  held-out nll %.4f  accuracy %.4f per masked token",
                self.step,
                values["valid/nll"],
                values["valid/accuracy"],
            )

    def save(self, *, needed: bool = False) -> None:
        """Save the present state: begin it, or where it is `needed` or `checkpoint.asynchronous` is off, finish it.

        A save that fails is only an alarm while an older checkpoint is there, unless this one is `needed`; else
        SaveFailed or WriterLost, on every rank. RunStopped, as soon as it is seen, where a parameter is not finite.
        """
        self.meter.judge()
        with self.meter.pause():
            self._conclude(self._saver.wait(), needed=False)
            failed = self._saver.start(self.step, self._state())
            if failed or needed or not self.config.checkpoint.asynchronous:
                self._conclude(failed or self._saver.wait(), needed)

    def seconds_to_save(self, *, due: bool) -> float:
        """Seconds until the state after the next step could be on disk, that step not counted; `due`: a save comes
        before. As the slowest save of this launch; before there was one, as on a slow file system."""
        one = self._slowest_save or BYTES_PER_PARAMETER * self.engine.num_parameters / SLOWEST_WRITE
        return one * (2 if due or self._saver.busy else 1)

    @property
    def saving(self) -> bool:
        """Whether a save is under way."""
        return self._saver.busy

    def attend_save(self) -> None:
        """At a step edge: see whether a save under way is done."""
        self._conclude(self._saver.attend(), needed=False)

    def _conclude(self, saved: Saved | None, needed: bool) -> None:
        if saved is None:
            return
        self._slowest_save = max(self._slowest_save, saved.seconds)
        if isinstance(failed := saved.outcome, Failed):
            older = self.process.run_on_first_rank(lambda: checkpoint_files.has_whole(self.path))
            if needed or not older or failed.kind is Failure.VALUES:
                raise SAVE_ERRORS[failed.kind](f"step {saved.step} was not saved: {failed.why}")
        if self._events is not None:
            self._report(saved)

    def _report(self, saved: Saved) -> None:
        """On rank 0."""
        if isinstance(outcome := saved.outcome, Failed):
            logger.error("step %d was not saved: %s Training goes on.", saved.step, outcome.why)
            self._events.tags({f"save_failed_step_{saved.step}": outcome.why})
            return
        self._log_checkpoint(saved.folder, saved.step, saved.evaluation)
        self._events.metrics(saved.step, {"checkpoint/stall_seconds": saved.stall, "checkpoint/seconds": saved.seconds})
        if outcome.alarm:
            logger.error("%s", outcome.alarm)
        removed = f"; removed {', '.join(outcome.removed)}" if outcome.removed else ""
        logger.info(
            "step %d saved in %.1f s, training waited %.2f s%s", saved.step, saved.seconds, saved.stall, removed
        )

    def _log_checkpoint(self, folder: Path, step: int, evaluation: dict[str, float] | None) -> None:
        """Log the evaluation of a checkpoint as a child run that names the checkpoint; a second time does nothing."""
        if evaluation is not None:
            tags = {"split": "valid", "tokens": int(evaluation["tokens"]), **reader.reference(folder)}
            self._events.child_run("evaluation", step, _valid_metrics(evaluation), tags)

    def _state(self) -> dict[str, Any]:
        config, engine = self.config, self.engine
        return {
            "step": self.step,
            "seed": config.seed,
            "evaluation": self.evaluation,
            "progress": vars(self.meter.progress),
            **checkpoint.scalars(engine),
            **self._fingerprints(),
            "config_hash": provenance.config_hash(self._config_text),
            "versions": provenance.versions(),
            "git_commit": provenance.git_commit(),
            "parameters": engine.num_parameters,
            "layout": {
                "world": self.process.world,
                "tensor": config.parallel.tensor,
                "pipeline": config.parallel.pipeline,
                "zero": engine.zero,
                "dtype": str(engine.dtype).removeprefix("torch."),
                "micro": config.batch.micro,
                "device": self.process.device.type,
            },
        }

    def shut_down(self) -> None:
        """Take the engine apart, while the other ranks are still there."""
        if self.engine is not None:
            self.engine.close()

    def close(self, status: str) -> None:
        """Let go of everything else; `status` as in `EventLog.status`. Sending what is left to MLflow takes a bounded
        time."""
        if self._loader is not None:
            self._loader.close()
        if self._samples is not None:
            self._samples.close()
        if self._saver is not None:
            self._saver.close()
        if self._tracker is not None:
            self._tracker.close(status, timeout=SENDING[status])
        if self._events is not None:
            self._events.close()
        if self._folder is not None:
            self._folder.close()


def _valid_metrics(evaluation: dict[str, float]) -> dict[str, float]:
    nll = evaluation["nll"]
    return {"valid/nll": nll, "valid/accuracy": evaluation["accuracy"], "valid/perplexity": math.exp(min(nll, 700.0))}
