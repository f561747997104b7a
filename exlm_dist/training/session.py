"""A run while it is being trained: everything it holds open, and its three actions (step, evaluate, save)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from exlm_dist.config import RunConfig, check_world, config_difference, dump_config
from exlm_dist.data.loader import Loader, eval_batches
from exlm_dist.data.shards import ShardDataset
from exlm_dist.data.tokenizer import load_tokenizer
from exlm_dist.launch import heartbeat
from exlm_dist.model import checkpoint_reader as reader
from exlm_dist.model.scoring import Totals, score
from exlm_dist.parallel.process import Process
from exlm_dist.tracking import EVENTS, EventLog, Tracker
from exlm_dist.training import checkpoint, checkpoint_files, provenance
from exlm_dist.training.engine import Engine, working_dtype
from exlm_dist.training.observers import Meter, Progress
from exlm_dist.training.run_folder import LOCK_PATIENCE, RunFolder, difference_table
from exlm_dist.training.sample_log import SampleLog
from exlm_dist.training.step import optimizer_step, to_stream
from exlm_dist.utils.errors import CheckpointError, RunStopped
from exlm_dist.utils.logs import get_logger

#: Seconds that sending the last events to MLflow may take at the end of a launch, by how it ended.
SENDING = {"FINISHED": 30.0, "KILLED": 5.0, "FAILED": 3.0}
#: Bytes per second of a slow shared file system, hashing included.
SLOWEST_WRITE = 100e6
logger = get_logger(__name__)


class Session:
    """One launch of a run, from its opened folder to its end. `close` always; all ranks call everything in the same
    order."""

    def __init__(self, config: RunConfig, process: Process) -> None:
        self.config, self.process = config, process
        self._folder: RunFolder | None = None
        self._events: EventLog | None = None
        self._tracker: Tracker | None = None
        self._loader: Loader | None = None
        self._samples: SampleLog | None = None
        self.engine: Engine | None = None
        self.step = 0
        self.evaluation: dict[str, float] | None = None  # of the current step

    def open(self) -> bool:
        """Lock the folder, find where to go on and build everything. False: the run is finished, there is nothing to
        do."""
        config, process = self.config, self.process
        check_world(config, process.world)
        working_dtype(config, process.device)
        self.path = Path(process.first_only(self._open_folder))
        self.train_data = process.together(lambda: self._dataset("train"))
        self.valid_data = (
            process.together(lambda: self._dataset("valid"))
            if self.train_data.manifest["splits"]["valid"]["shards"]
            else None
        )
        self.tokenizer = load_tokenizer(self.train_data.tokenizer_path)
        found = checkpoint.select(self.path, process)
        state = found[1] if found else {"step": 0, "progress": {}}
        if found:
            process.together(lambda: self._check_origin(*found))
        self.step, self.evaluation = state["step"], state.get("evaluation")
        if self.step >= config.schedule.steps:
            return False
        self._loader = process.together(self._make_loader)
        self.engine = Engine(config, process, self.train_data.vocab_size)
        if found:
            self._resume(*found)
        progress = Progress(**state["progress"])
        if process.is_first:
            self._events = EventLog(self.path / EVENTS)
            if found:
                # The launch that wrote it may have been killed before it could say so.
                self._log_checkpoint(found[0], self.step, self.evaluation)
            self._tracker = Tracker.start(self.path, config, self._events)
        if config.tracking.samples:
            self._samples = SampleLog(self.path, process.rank, process.world)
        self.meter = Meter(config, process, self._events, progress)
        logger.info(
            "%s: %s step %d of %d, %.1f M parameters, %d ranks x %d micro-batches of %d, ZeRO %d, %s on %s",
            config.name,
            "continuing after" if found else "starting at",
            self.step,
            config.schedule.steps,
            self.engine.num_parameters / 1e6,
            process.world,
            self.engine.accumulation,
            config.batch.micro,
            self.engine.zero,
            str(self.engine.dtype).removeprefix("torch."),
            process.device.type,
        )
        return True

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
        config, process = self.config, self.process
        return {
            "masking": config.masking,
            "states": config.model.states,
            "anchors": config.model.anchors,
            "micro": config.batch.micro,
            "max_positions": config.model.max_positions,
            "bucket": config.data.bucket,
            "vocab_size": self.train_data.vocab_size,
            "rank": process.rank,
            "world": process.world,
        }

    def _resume(self, folder: Path, state: dict[str, Any]) -> None:
        model, optimizer = reader.load_weights(folder, verified=True), reader.load_optimizer(folder, verified=True)
        self.process.together(lambda: checkpoint.check(self.engine, model, optimizer))
        batch = self._loader.step(self.step).micro_batches[0]
        checkpoint.prime(self.engine, to_stream(batch, self.config, self.process.device))
        checkpoint.put(self.engine, model, optimizer, state)

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
        with self.meter.pause(), self.engine.plain_model() as model:
            batches = eval_batches(self.valid_data, sequences=self.config.evaluation.sequences, **self._packing())
            mine = score(model, heartbeat.beating(batches), self.process.device)
            sums = self.process.gather([mine.nll, mine.correct, mine.count]).sum(0).tolist()
            self.evaluation = Totals(*sums).means()
        if self._events is not None:
            values = _valid_metrics(self.evaluation)
            self._events.metrics(self.step, values)
            logger.info("step %d  held-out nll %.4f  accuracy %.4f per masked token", self.step, values["valid/nll"],
                        values["valid/accuracy"])

    def expected_save_seconds(self) -> float:
        """A careful guess for the first save of a launch; later ones are measured."""
        return 12 * self.engine.num_parameters / SLOWEST_WRITE

    def save(self, *, needed: bool = False) -> None:
        """Write a checkpoint. A full disk is only an alarm while an older checkpoint is there, unless this one is
        `needed`."""
        self.meter.judge()
        with self.meter.pause():
            model, optimizer, scalars = checkpoint.take(self.engine)
            failure = self.process.first_only(lambda: self._write(model, optimizer, scalars, needed))
        if failure and self.process.is_first:
            logger.error("%s Training goes on.", failure)
            self._events.tags({f"save_failed_step_{self.step}": failure})

    def _write(
        self, model: checkpoint.Tensors, optimizer: checkpoint.Tensors, scalars: dict[str, Any], needed: bool
    ) -> str | None:
        """On rank 0. None, or why nothing was written."""
        broken = next(checkpoint.not_finite(model), None)
        if broken is not None:
            raise RunStopped(
                f"parameter {broken} is not finite after step {self.step}; it was not saved. "
                "Lower optimizer.lr or set optimizer.clip, and go on from an older checkpoint."
            )
        self._events.flush()
        try:
            folder = checkpoint_files.write_checkpoint(
                self.path,
                self.step,
                model=model,
                optimizer=optimizer,
                state=self._state(scalars),
                config=dump_config(self.config),
                tokenizer=self.train_data.tokenizer_path,
            )
        except checkpoint_files.DiskFull as error:
            if needed or not checkpoint_files.has_whole(self.path):
                raise
            return str(error)
        self._log_checkpoint(folder, self.step, self.evaluation)
        removed = checkpoint_files.retain(self.path, self.config.checkpoint.keep, self.config.checkpoint.best)
        logger.info(
            "step %d saved%s", self.step, f"; removed {', '.join(folder.name for folder in removed)}" if removed else ""
        )
        return None

    def _log_checkpoint(self, folder: Path, step: int, evaluation: dict[str, float] | None) -> None:
        """Log the evaluation of a checkpoint as a child run that names the checkpoint; a second time does nothing."""
        if evaluation is not None:
            tags = {"split": "valid", "tokens": int(evaluation["tokens"]), **reader.reference(folder)}
            self._events.child_run("evaluation", step, _valid_metrics(evaluation), tags)

    def _state(self, scalars: dict[str, Any]) -> dict[str, Any]:
        config, engine = self.config, self.engine
        return {
            "step": self.step,
            "seed": config.seed,
            "evaluation": self.evaluation,
            "progress": vars(self.meter.progress),
            **scalars,
            **self._fingerprints(),
            "config_hash": provenance.config_hash(config),
            "versions": provenance.versions(),
            "git_commit": provenance.git_commit(),
            "parameters": engine.num_parameters,
            "layout": {
                "world": self.process.world,
                "zero": engine.zero,
                "dtype": str(engine.dtype).removeprefix("torch."),
                "micro": config.batch.micro,
                "device": self.process.device.type,
            },
        }

    def disband(self) -> None:
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
        if self._tracker is not None:
            self._tracker.close(status, timeout=SENDING[status])
        if self._events is not None:
            self._events.close()
        if self._folder is not None:
            self._folder.close()


def _valid_metrics(evaluation: dict[str, float]) -> dict[str, float]:
    nll = evaluation["nll"]
    return {"valid/nll": nll, "valid/accuracy": evaluation["accuracy"], "valid/perplexity": math.exp(min(nll, 700.0))}
