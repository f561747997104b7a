"""One optimizer step and what it leaves to be reported."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from exlm_dist.config.schema import RunConfig
from exlm_dist.data.loader import StepBatches
from exlm_dist.training.engine.base import Engine
from exlm_dist.training.schedule import learning_rate


@dataclass(frozen=True)
class StepResult:
    """What a step leaves to be reported. Tensors stay on the device: reading them waits for it."""

    step: int
    loss: torch.Tensor  # this rank's share of the loss of the global batch; the sum over ranks is the loss
    invalid: list[tuple[np.ndarray, torch.Tensor]]  # per micro-batch: sample ids [B], left out [B] bool
    scores: torch.Tensor | None  # [nll sum, correct, count] over the masked tokens of the last micro-batch
    grad_norm: torch.Tensor | float
    rate: float
    batches: StepBatches  # its sizes; the micro-batches themselves are let go
    padding_fraction: float


def optimizer_step(engine: Engine, batches: StepBatches, config: RunConfig, *, scored: bool) -> StepResult:
    """Run one step. The loss is divided by the sequences (or targets) of the global batch, so that any split of it
    into ranks and micro-batches gives the same gradient. `scored`: also measure nll and accuracy on the last
    micro-batch."""
    denominator = batches.num_sequences if config.loss.reduction == "sequence" else batches.num_targets
    rate = learning_rate(batches.step, config.optimizer.lr, config.schedule)
    engine.set_learning_rate(rate)
    done = engine.train(batches.micro_batches, denominator, scored=scored)
    invalid = [(batch.sample_ids, left_out) for batch, left_out in zip(batches.micro_batches, done.invalid)]
    sizes = replace(batches, micro_batches=[])
    return StepResult(
        batches.step, done.loss, invalid, done.scores, done.grad_norm, rate, sizes, batches.padding_fraction
    )
