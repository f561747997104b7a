"""A run while it trains: everything that one launch of it works with, built whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from exlm_dist.checkpoint.tensors import TensorReader
from exlm_dist.config import RunConfig, dump_config
from exlm_dist.data.loader import Loader
from exlm_dist.data.mixed import MixedDataset
from exlm_dist.data.mixed_order import training_order
from exlm_dist.data.recipe import Recipe
from exlm_dist.data.repeated import with_copies
from exlm_dist.data.shard_index import Lengths
from exlm_dist.launch import heartbeat
from exlm_dist.parallel.process import Process
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.tracking import CHANGES, EVENTS, EventLog, Tracker
from exlm_dist.training.changes import describe
from exlm_dist.training.checkpointer import Checkpointer
from exlm_dist.training.damage_log import DamageLog
from exlm_dist.training.engine import build_engine
from exlm_dist.training.engine import state as engine_state
from exlm_dist.training.engine.base import Engine
from exlm_dist.training.evaluator import Evaluator
from exlm_dist.training.observers import Meter, Progress
from exlm_dist.training.recheck import Recheck
from exlm_dist.training.resources import Resources
from exlm_dist.training.sample_log import SampleLog
from exlm_dist.training.saver import Saver
from exlm_dist.training.sources import Sources
from exlm_dist.training.starting_point import StartingPoint
from exlm_dist.training.step import optimizer_step
from exlm_dist.training.warm_start import (
    InitialWeights,
    Source,
    match_parameters,
    other_states,
    summary,
    table,
    tags,
)
from exlm_dist.utils.logs import get_logger

#: Seconds that sending the last events to MLflow may take at the end of a launch, by how it ended.
SENDING = {"FINISHED": 30.0, "KILLED": 5.0, "FAILED": 3.0}
logger = get_logger(__name__)


@dataclass
class Session:
    """One launch of a run. All ranks call everything in it in the same order."""

    config: RunConfig
    process: Process
    loader: Loader
    engine: Engine
    evaluator: Evaluator
    checkpointer: Checkpointer
    meter: Meter
    samples: SampleLog | None
    recheck: Recheck | None
    step: int  # optimizer steps done
    evaluation: dict[str, float] | None  # of the weights after `step` steps, once it was made

    def train_step(self) -> None:
        """One optimizer step, and what is noted of it."""
        batches = self.loader.step(self.step)
        heartbeat.beat(self.step)
        scored, check = self.meter.is_logged(self.step), None
        if self.recheck and self.recheck.is_due(self.step + 1, saved=self.checkpointer.is_due(self.step + 1)):
            check = self.recheck.of_step(batches, scored=scored)
        result = optimizer_step(self.engine, batches, self.config, scored=scored, check=check)
        self.step += 1
        heartbeat.beat(self.step)
        self.evaluation = None
        if self.samples is not None:
            self.samples.write(result)
        self.meter.after_step(result)

    def evaluate(self) -> None:
        """Score the weights as they are now on the held-out split."""
        with self.meter.pause():
            self.evaluation = self.evaluator.evaluate(self.step)


def build_session(config: RunConfig, process: Process, start: StartingPoint, resources: Resources) -> Session:
    """Everything a launch needs to go on from `start`, which must not be the end of the run. A collective.

    What has to be closed is pushed on `resources` as soon as it is open. ConfigError and CheckpointError as their
    parts raise them.
    """
    heartbeat.enter("start/model")
    loader = process.run_everywhere(lambda: _loader(config, process, start))
    resources.callback(loader.close)
    length = config.masking.copies * float(start.train_data.lengths.mean()) + 2
    engine = build_engine(config, process, start.train_data.vocab_size, length, drawn=start.checkpoint is None)
    saver = Saver(
        start.path,
        engine,
        config.checkpoint,
        config=dump_config(config),
        tokenizer=start.train_data.tokenizer_path,
        log=start.path / EVENTS,
    )
    resources.callback(saver.close)
    heartbeat.enter("start/weights")
    init = start.state.get("init")
    if start.checkpoint is not None:
        _resume(process, start, loader, engine, saver)
    elif start.source is not None:
        init = _take_weights(config, start, start.source, engine, saver)
    events = _track(config, start, init, resources) if process.is_first else None
    samples = None
    if config.tracking.samples and process.grid.reports_metrics:
        samples = SampleLog(start.path, process.grid.data.rank, process.grid.data.size, anew=start.step == 0)
        resources.callback(samples.close)
    damage = None
    if process.grid.reports_metrics:
        damage = DamageLog(start.path, process.grid.data.rank, start.opened)
    sources = Sources.of(config, start.train_data) if isinstance(start.train_data, MixedDataset) else None
    meter = Meter(config, process, events, Progress(**start.state["progress"]), damage, sources)
    checkpointer = Checkpointer(config, process, start, engine, saver, meter, init)
    evaluation = start.state.get("evaluation")
    if start.checkpoint is not None:
        # The launch that wrote it may have been killed before it could say so.
        checkpointer.log_evaluation(start.checkpoint, start.step, evaluation)
    evaluator = Evaluator(config, process, engine, start.held_out, events)
    recheck = Recheck.of(config, process, engine, loader, start.path, events)
    _announce(config, process, start, engine)
    if sources is not None and process.is_first:
        sources.announce()
    return Session(
        config, process, loader, engine, evaluator, checkpointer, meter, samples, recheck, start.step, evaluation
    )


def _loader(config: RunConfig, process: Process, start: StartingPoint) -> Loader:
    data = process.grid.data
    recipe = Recipe.of(config, start.train_data.vocab_size, load_tokenizer(start.train_data.tokenizer_path))
    _check_lengths(config, start, recipe)
    return Loader(
        with_copies(start.train_data, config.masking.copies),
        recipe,
        order=training_order(config, start.train_data),
        global_batch=config.batch.sequences,
        rank=data.rank,
        world=data.size,
        prefetch=config.data.prefetch,
    )


def _check_lengths(config: RunConfig, start: StartingPoint, recipe: Recipe) -> None:
    """ConfigError, before anything is trained, if a sequence of training or evaluation could become too long; it says
    what is enough for all."""
    copies = config.masking.copies
    uses: list[tuple[Recipe, np.ndarray | Lengths]] = [(recipe, start.train_data.lengths * copies)]
    for held_out in start.held_out.values():
        evaluated = held_out.lengths[: config.evaluation.sequences] * copies
        uses.append((Recipe.for_evaluation(config, recipe.vocab_size), evaluated))
    longest, lengths = max(uses, key=lambda use: use[0].longest(use[1]))
    longest.check_lengths(lengths)


def _resume(process: Process, start: StartingPoint, loader: Loader, engine: Engine, saver: Saver) -> None:
    """Fill the engine from the checkpoint."""
    assert start.checkpoint is not None
    folder = start.checkpoint
    tensors = process.run_everywhere(lambda: TensorReader(folder))
    process.run_everywhere(lambda: engine_state.check_index(saver.index, tensors.index))
    engine.prime(loader.step(start.step).micro_batches)
    engine_state.restore(engine, tensors, start.state)


def _take_weights(
    config: RunConfig, start: StartingPoint, source: Source, engine: Engine, saver: Saver
) -> dict[str, Any]:
    """Fill the engine of a new run from the source of its weights; what `state.json` says of it."""
    shapes, theirs = saver.index.shapes, source.tensors.index.shapes
    match = match_parameters(shapes, theirs, load_tokenizer(start.train_data.tokenizer_path).tokens(), source.tokens)
    weights = InitialWeights(source, match, shapes, seed=config.seed, std=config.model.init_std)
    engine_state.fill_parameters(engine, weights, weights.names)
    init = {**source.about, **summary(match, shapes, other_states(source, config.model))}
    logger.info("%s starts with the weights of a checkpoint:\n%s", config.name, table(init, match.new_tokens))
    return init


def _track(config: RunConfig, start: StartingPoint, init: dict[str, Any] | None, resources: Resources) -> EventLog:
    """The event log, and MLflow fed from it. On rank 0."""
    events = EventLog(start.path / EVENTS)
    resources.callback(events.close)
    tracker = Tracker.start(start.path, config, events, tags={CHANGES: describe(start.changes), **tags(init)})
    resources.callback(lambda: tracker.close(resources.status, timeout=SENDING[resources.status]))
    return events


def _announce(config: RunConfig, process: Process, start: StartingPoint, engine: Engine) -> None:
    logger.info(
        "%s: %s step %d of %d, %.1f M parameters, tensor %d x pipeline %d x data %d ranks, "
        "%d micro-batches of %d on each, ZeRO %d, %s on %s",
        config.name,
        "continuing after" if start.checkpoint else "starting at",
        start.step,
        config.schedule.steps,
        engine.num_parameters / 1e6,
        config.parallel.tensor,
        config.parallel.pipeline,
        process.grid.data.size,
        engine.accumulation,
        config.batch.micro,
        engine.zero,
        str(engine.dtype).removeprefix("torch."),
        process.device.type,
    )
