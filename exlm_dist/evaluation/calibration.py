"""How sure a model is, and whether it is right as often as it says: entropy, reliability table, calibration error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Bins of equal width, as in Guo et al. (2017).
BINS = 15


@dataclass(frozen=True)
class Reliability:
    """Predictions by the probability that the model gives them: n_m of them, with what mean probability, and how many
    are right, in bins ((m - 1) / M, m / M] of which the first has 0 too. All three are float64 [M], sums over the bin.
    """

    counts: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray

    @classmethod
    def of(cls, confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Reliability:
        """confidence [n]: probability of what is predicted, 0 to 1; correct bool [n]."""
        confidence = np.clip(confidence, 0.0, 1.0)
        where = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
        weights = (np.ones(len(where)), confidence, correct.astype(float))
        return cls(*(np.bincount(where, weight, bins) for weight in weights))

    @property
    def error(self) -> float:
        """Expected calibration error, sum_m n_m / n |accuracy_m - confidence_m|; 0 to 1, NaN of nothing."""
        total = self.counts.sum()
        return float(np.abs(self.correct - self.confidence).sum() / total) if total else float("nan")

    def table(self) -> list[dict[str, float]]:
        """The bins that are not empty: limits, number, mean confidence, accuracy."""
        limits = np.linspace(0, 1, len(self.counts) + 1)
        return [
            {
                "above": float(limits[m]),
                "to": float(limits[m + 1]),
                "count": int(self.counts[m]),
                "confidence": float(self.confidence[m] / self.counts[m]),
                "accuracy": float(self.correct[m] / self.counts[m]),
            }
            for m in np.flatnonzero(self.counts)
        ]


def entropy(distributions: np.ndarray) -> np.ndarray:
    """In nats, of each row of [n, V] -> [n]."""
    safe = np.where(distributions > 0, distributions, 1.0)
    return -(distributions * np.log(safe)).sum(1)
