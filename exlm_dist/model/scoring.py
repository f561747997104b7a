"""The comparable metrics over many batches, as evaluation and the training loop both compute them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from exlm_dist.data.batch import PackedBatch
from exlm_dist.model.alignment import AlignmentTotals, alignment_sums
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
    alignment: tuple[float, ...]  # values of `AlignmentTotals`

    @classmethod
    def of(cls, values: Sequence[float]) -> Totals:
        """From all values in one row, those of the alignment last."""
        single = len(fields(cls)) - 1
        return cls(*values[:single], alignment=tuple(values[single:]))

    @classmethod
    def zeros(cls, states: int) -> Totals:
        """Those of no sequence, for a model with `states` per masked token."""
        return cls.of([0.0] * (len(fields(cls)) - 1 + AlignmentTotals.size(states)))

    def vector(self) -> list[float]:
        """All values in one row, the inverse of `of`."""
        *single, alignment = (getattr(self, field.name) for field in fields(self))
        return [*single, *alignment]

    def means(self) -> dict[str, float]:
        """The metrics of docs/evaluation.md but `exact`, and the number of masked `tokens`."""
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
            **AlignmentTotals.of(self.alignment).means(),
        }


@torch.no_grad()
def evaluation_sums(result: Stream, is_masked: Tensor) -> Tensor:
    """The values of `Totals` of a stream that has passed all layers with `predict`, fp64; is_masked [N] bool.

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
    summed = torch.stack([rows.double().sum() for rows in sums])
    return torch.cat([masked_scores(result, is_masked), summed, alignment_sums(result, chosen)])


@torch.no_grad()
def score(model: LanguageModel, batches: Iterable[PackedBatch], device: torch.device | str) -> Totals:
    """Totals of `model` over `batches`, without dropout; the model is left in the mode it was in.

    A filler batch is run, to keep the ranks in step, but has no masked token and so adds nothing.
    """
    sums = []
    training = model.training
    model.eval()
    try:
        for batch in batches:
            result = model(Stream.from_batch(batch, device).replace(predict=True))
            sums.append(evaluation_sums(result, torch.from_numpy(batch.is_masked).to(device)))
    finally:
        model.train(training)
    return Totals.of(torch.stack(sums).sum(0).tolist())
