"""One optimizer step: the micro-batches of this rank, their loss over the global denominator, the update."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from exlm_dist.config.schema import RunConfig
from exlm_dist.data.batch import PackedBatch
from exlm_dist.data.loader import StepBatches
from exlm_dist.model.stream import Stream
from exlm_dist.training.engine import Engine
from exlm_dist.training.schedule import learning_rate
from exlm_dist.utils.seeding import seed_from


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
    padding_share: float


def to_stream(batch: PackedBatch, config: RunConfig, device: torch.device) -> Stream:
    """A micro-batch on the device, with the key of its dropout masks: a pure function of the seed and its place in the
    run."""
    return Stream.from_batch(batch, device, dropout_seed=seed_from(config.seed, "dropout", batch.step, batch.index))


def optimizer_step(engine: Engine, batches: StepBatches, config: RunConfig, *, scored: bool) -> StepResult:
    """Run one step. The loss is divided by the sequences (or targets) of the global batch, so that any split of it
    into ranks
    and micro-batches gives the same gradient. `scored`: also measure nll and accuracy on the last micro-batch."""
    device = engine.process.device
    denominator = batches.num_sequences if config.loss.reduction == "sequence" else batches.num_targets
    rate = learning_rate(batches.step, config.optimizer.lr, config.schedule)
    engine.set_learning_rate(rate)
    total = torch.zeros((), dtype=torch.float64, device=device)
    invalid, scores = [], None
    for batch in batches.micro_batches:
        last = batch is batches.micro_batches[-1]
        is_masked = torch.from_numpy(batch.is_masked).to(device) if scored and last else None
        loss, left_out, scores = engine.forward(to_stream(batch, config, device), is_masked, last=last)
        engine.backward(loss / denominator)
        total += loss.detach() / denominator
        invalid.append((batch.sample_ids, left_out))
    norm = engine.step()
    return StepResult(
        batches.step, total, invalid, scores, norm, rate, replace(batches, micro_batches=[]), batches.padding_share
    )
