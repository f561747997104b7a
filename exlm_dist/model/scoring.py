"""The comparable metric over many batches, as evaluation and the training loop both compute it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from exlm_dist.data.batch import PackedBatch
from exlm_dist.model.build import LanguageModel
from exlm_dist.model.objective import evaluate_masked
from exlm_dist.model.stream import Stream


@dataclass(frozen=True)
class Totals:
    """Sums over masked tokens. Totals of several ranks are added before a mean is taken."""

    nll: float  # nats
    correct: float
    count: float

    def means(self) -> dict[str, float]:
        """`nll` (nats) and `accuracy` per masked token, and the number of `tokens`."""
        return {"nll": self.nll / self.count, "accuracy": self.correct / self.count, "tokens": self.count}


@torch.no_grad()
def score(model: LanguageModel, batches: Iterable[PackedBatch], device: torch.device | str) -> Totals:
    """Totals of `model` over `batches`, without dropout; the model is left in the mode it was in.

    A filler batch is run, to keep the ranks in step, but has no masked token and so adds nothing.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    try:
        for batch in batches:
            stream = Stream.from_batch(batch, device)
            scores = evaluate_masked(model, stream, torch.from_numpy(batch.is_masked).to(device))
            sums += scores.stacked()
    finally:
        model.train(training)
    return Totals(*sums.tolist())
