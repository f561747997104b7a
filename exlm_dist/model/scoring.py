"""The comparable metrics over many batches, as evaluation and the training loop both compute them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from exlm_dist.data.batch import PackedBatch
from exlm_dist.model.build import LanguageModel
from exlm_dist.model.objective import joint_log_probs, masked_scores
from exlm_dist.model.stream import Stream


@dataclass(frozen=True)
class Totals:
    """Sums over held-out sequences. Totals of several ranks are added before a mean is taken."""

    nll: float  # nats, each masked token by itself
    correct: float
    count: float  # masked tokens
    joint_nll: float  # nats, all masked tokens of a sequence at once
    objective_nll: float  # nats, -log P of the targets, of the sequences in which it is finite
    targets: float  # of the same sequences
    invalid: float  # the other sequences
    sequences: float

    @classmethod
    def zeros(cls) -> Totals:
        """Those of no sequence."""
        return cls(*[0.0] * len(fields(cls)))

    def vector(self) -> list[float]:
        """All fields, in their order."""
        return list(astuple(self))

    def means(self) -> dict[str, float]:
        """The metrics of docs/metric.md: `nll`, `joint_nll` and `coupling` in nats per masked token, `accuracy`,
        `perplexity`, `objective_nll` in nats per target, `invalid` sequences as a fraction; and the number of
        `tokens`."""
        nll, joint = self.nll / self.count, self.joint_nll / self.count
        return {
            "nll": nll,
            "accuracy": self.correct / self.count,
            "perplexity": math.exp(nll) if nll < 700 else math.inf,
            "joint_nll": joint,
            "coupling": nll - joint,
            "objective_nll": self.objective_nll / self.targets if self.targets else math.nan,
            "invalid": self.invalid / self.sequences,
            "tokens": self.count,
        }


@torch.no_grad()
def evaluation_sums(result: Stream, is_masked: Tensor) -> Tensor:
    """The fields of `Totals` of a stream that has passed all layers with `predict`, [8] fp64; is_masked [N] bool.

    A sequence without a masked token, such as those of a filler batch, adds nothing.
    """
    chosen = result.by_target(is_masked, False)
    real = chosen.any(1)
    joint = torch.where(real, joint_log_probs(result, chosen), 0.0)
    finite = real & torch.isfinite(result.log_likelihood)
    sums = [
        -joint,
        -torch.where(finite, result.log_likelihood, 0.0),
        result.num_targets * finite,
        real & ~finite,
        real,
    ]
    return torch.cat([masked_scores(result, is_masked), torch.stack([rows.double().sum() for rows in sums])])


@torch.no_grad()
def score(model: LanguageModel, batches: Iterable[PackedBatch], device: torch.device | str) -> Totals:
    """Totals of `model` over `batches`, without dropout; the model is left in the mode it was in.

    A filler batch is run, to keep the ranks in step, but has no masked token and so adds nothing.
    """
    sums = torch.tensor(Totals.zeros().vector(), dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    try:
        for batch in batches:
            result = model(Stream.from_batch(batch, device).replace(predict=True))
            sums += evaluation_sums(result, torch.from_numpy(batch.is_masked).to(device))
    finally:
        model.train(training)
    return Totals(*sums.tolist())
