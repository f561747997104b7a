"""Evaluation on the held-out split while a run trains: the comparable metric, over all ranks."""

from __future__ import annotations

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

logger = get_logger(__name__)


class Evaluator:
    """Scores the weights of an engine. `dataset`: None where there is no held-out split; `events`: on rank 0 only."""

    def __init__(
        self, config: RunConfig, process: Process, engine: Engine, dataset: ShardDataset | None, events: EventLog | None
    ) -> None:
        self._config, self._process, self._engine = config, process, engine
        self._dataset, self._events = dataset, events

    def is_due(self, step: int) -> bool:
        """After every `evaluation.every` steps and after the last one, where there is a held-out split."""
        every, last = self._config.evaluation.every, step == self._config.schedule.steps
        return self._dataset is not None and (last or (every > 0 and step % every == 0))

    def evaluate(self, step: int) -> dict[str, float]:
        """The metrics of `Totals.means` after `step` steps. A collective."""
        assert self._dataset is not None, "is_due says when"
        config, data = self._config, self._process.grid.data
        recipe = Recipe.for_evaluation(config, self._dataset.vocab_size)
        dataset = with_copies(self._dataset, config.masking.copies)
        batches = eval_batches(dataset, recipe, sequences=config.evaluation.sequences, rank=data.rank, world=data.size)
        local = self._engine.evaluate(heartbeat.keep_alive(batches))
        sums = self._process.all_gather(local.vector()).sum(0).tolist()
        evaluation = Totals.of(sums).means()
        if self._events is not None:
            values = valid_metrics(evaluation)
            self._events.metrics(step, values)
            logger.info(
                "step %d  held-out nll %.4f  joint nll %.4f  accuracy %.4f per masked token",
                step,
                *(values[f"valid/{name}"] for name in ("nll", "joint_nll", "accuracy")),
            )
        return evaluation


def valid_metrics(evaluation: dict[str, float]) -> dict[str, float]:
    """An evaluation under the names used in `events.jsonl` and MLflow."""
    return {f"valid/{name}": value for name, value in evaluation.items() if name != "tokens"}
