"""Evaluation on the held-out split while a run trains: the comparable metric, over all ranks."""

from __future__ import annotations

from collections.abc import Mapping

from exlm_dist.config import RunConfig
from exlm_dist.data.loader import eval_batches
from exlm_dist.data.recipe import Recipe
from exlm_dist.data.repeated import with_copies
from exlm_dist.data.shards import ShardDataset
from exlm_dist.launch import heartbeat
from exlm_dist.model.scoring import Totals
from exlm_dist.parallel.process import Process
from exlm_dist.tracking import EventLog
from exlm_dist.training.engine.base import Engine
from exlm_dist.utils.logs import get_logger

#: Metrics that are reported of each source.
OF_SOURCES = ("nll", "joint_nll", "accuracy")
logger = get_logger(__name__)


class Evaluator:
    """Scores the weights of an engine. `held_out`: the held-out split of each source that has one; `events`: on rank 0
    only."""

    def __init__(
        self,
        config: RunConfig,
        process: Process,
        engine: Engine,
        held_out: Mapping[str, ShardDataset],
        events: EventLog | None,
    ) -> None:
        self._config, self._process, self._engine = config, process, engine
        self._held_out, self._events = held_out, events

    def is_due(self, step: int) -> bool:
        """After every `evaluation.every` steps and after the last one, where there is a held-out split."""
        every, last = self._config.evaluation.every, step == self._config.schedule.steps
        return bool(self._held_out) and (last or (every > 0 and step % every == 0))

    def evaluate(self, step: int) -> dict[str, float]:
        """The metrics of `Totals.means` after `step` steps, over the held-out splits of all sources; of several sources
        also nll, joint_nll and accuracy of each, as `NAME/nll`. A collective."""
        assert self._held_out, "is_due says when"
        local = [self._score(dataset).vector() for dataset in self._held_out.values()]
        sums = self._process.all_gather([value for vector in local for value in vector]).sum(0).reshape(len(local), -1)
        evaluation = Totals.of(sums.sum(0).tolist()).means()
        if self._config.data.sources:
            for source, row in zip(self._held_out, sums.tolist()):
                means = Totals.of(row).means()
                evaluation |= {f"{source}/{name}": means[name] for name in OF_SOURCES}
        if self._events is not None:
            values = valid_metrics(evaluation)
            self._events.metrics(step, values)
            logger.info(
                "step %d  held-out nll %.4f  joint nll %.4f  accuracy %.4f per masked token",
                step,
                *(values[f"valid/{name}"] for name in ("nll", "joint_nll", "accuracy")),
            )
        return evaluation

    def _score(self, held_out: ShardDataset) -> Totals:
        """Of this rank's part of the first sequences of a source."""
        config, data = self._config, self._process.grid.data
        recipe = Recipe.for_evaluation(config, held_out.vocab_size)
        dataset = with_copies(held_out, config.masking.copies)
        batches = eval_batches(dataset, recipe, sequences=config.evaluation.sequences, rank=data.rank, world=data.size)
        return self._engine.evaluate(heartbeat.keep_alive(batches))


def valid_metrics(evaluation: dict[str, float]) -> dict[str, float]:
    """An evaluation under the names used in `events.jsonl` and MLflow."""
    return {f"valid/{name}": value for name, value in evaluation.items() if name != "tokens"}
