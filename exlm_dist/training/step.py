"""One optimizer step and what it leaves to be reported."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from exlm_dist.config.schema import RunConfig
from exlm_dist.data.loader import StepBatches
from exlm_dist.training.engine.base import BatchResult, Check, Engine
from exlm_dist.training.schedule import learning_rate


@dataclass(frozen=True)
class StepResult:
    """An optimizer step: what was trained on, and what came of it on this rank."""

    result: BatchResult
    rate: float  # learning rate
    sizes: StepBatches  # without the micro-batches themselves, which are freed
    sample_ids: list[np.ndarray]  # of each micro-batch of this rank, [B]
    padding_fraction: float  # of the tokens of this rank

    @property
    def step(self) -> int:
        """Number of the step, from 0."""
        return self.sizes.step


def optimizer_step(
    engine: Engine, batches: StepBatches, config: RunConfig, *, scored: bool, check: Check | None = None
) -> StepResult:
    """Run one step. `scored`: also measure nll and accuracy on the last micro-batch; `check`: see `Engine.train`."""
    denominator = loss_denominator(batches, config)
    rate = learning_rate(batches.step, config.optimizer.lr, config.schedule)
    engine.set_learning_rate(rate)
    result = engine.train(batches.micro_batches, denominator, scored=scored, check=check)
    sample_ids = [batch.sample_ids for batch in batches.micro_batches]
    return StepResult(result, rate, replace(batches, micro_batches=[]), sample_ids, batches.padding_fraction)


def loss_denominator(batches: StepBatches, config: RunConfig) -> int:
    """What the loss is divided by: the sequences (or targets) of the global batch, so that any split of it into ranks
    and micro-batches gives the same gradient."""
    return batches.num_sequences if config.loss.reduction == "sequence" else batches.num_targets
