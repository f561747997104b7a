"""What a model learns from labelled rows, and how its predictions are judged: all that the training does not know.

`TargetCriterion` is that of classes and values, from one vector for each sequence; `SpanCriterion` (span_criterion.py)
that of answers in a text, from two scores for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from exlm_dist.config.schema import ModelConfig
from exlm_dist.finetuning.dataset import Examples
from exlm_dist.finetuning.finetune_settings import TrainingSettings
from exlm_dist.finetuning.losses import predicted_values, weighted_loss
from exlm_dist.finetuning.metrics import evaluate_predictions
from exlm_dist.finetuning.property_model import PropertyModel, build_property_model
from exlm_dist.finetuning.targets import Target, label_weights
from exlm_dist.model.build import LanguageModel


class Criterion(Protocol):
    """Labels are float64 [m, labels of a row], NaN where missing; a model has outputs [B, ...] for B rows."""

    @property
    def width(self) -> int:
        """How many numbers are predicted for a row."""

    @property
    def pooled(self) -> bool:
        """Whether the head reads one vector for each sequence, which a frozen encoder then makes but once."""

    def model(self, body: LanguageModel, config: ModelConfig, settings: TrainingSettings, seed: int) -> PropertyModel:
        """A copy of `body` under a new head, whose weights depend on `seed`."""

    def weights(self, labels: np.ndarray, settings: TrainingSettings) -> np.ndarray:
        """Weight of each label in the loss, float64 of the shape of `labels`; 0 where it is missing."""

    def loss(self, outputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Sum over all labels of weight times loss, a scalar."""

    def predict(self, outputs: Tensor) -> Tensor:
        """What outputs mean, float64 [B, width]."""

    def score(self, values: np.ndarray, examples: Examples) -> dict[str, float]:
        """The metrics of what is predicted, float64 [m, width], for the rows of `examples`; NaN where undefined."""


@dataclass(frozen=True)
class TargetCriterion:
    """See `Criterion`: the columns `targets`, each of classes or of values."""

    targets: Sequence[Target]
    pooled: bool = True

    @property
    def width(self) -> int:
        """Outputs of all targets."""
        return sum(target.outputs for target in self.targets)

    def model(self, body: LanguageModel, config: ModelConfig, settings: TrainingSettings, seed: int) -> PropertyModel:
        """See `build_property_model`."""
        return build_property_model(
            body,
            config,
            self.width,
            seed=seed,
            pooling=settings.pooling,
            dropout=settings.dropout,
            frozen=settings.frozen,
        )

    def weights(self, labels: np.ndarray, settings: TrainingSettings) -> np.ndarray:
        """See `label_weights`."""
        return label_weights(self.targets, labels, settings.class_weights)

    def loss(self, outputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """See `weighted_loss`."""
        return weighted_loss(outputs, labels, weights, self.targets)

    def predict(self, outputs: Tensor) -> Tensor:
        """See `predicted_values`."""
        return predicted_values(outputs, self.targets)

    def score(self, values: np.ndarray, examples: Examples) -> dict[str, float]:
        """See `evaluate_predictions`."""
        return evaluate_predictions(values, examples.labels, self.targets)
