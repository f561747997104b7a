"""A linear model on what a checkpoint makes of each molecule, one for each target: what its embeddings say without any
training of the encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from exlm_dist.finetuning.finetune_settings import ERRORS
from exlm_dist.finetuning.metrics import evaluate_predictions
from exlm_dist.finetuning.splits import Parts
from exlm_dist.finetuning.targets import Target

#: What the regularisation is chosen from: scikit-learn's C, of a ridge regression 1 / alpha.
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
MOST_ITERATIONS = 1000


def predict_by_probe(
    features: np.ndarray, labels: np.ndarray, targets: Sequence[Target], parts: Parts, metric: str
) -> tuple[dict[str, np.ndarray], float]:
    """(predictions of all parts but the training part, float64 [rows, targets]: values, or the probability of the
    second class; the strength of regularisation, which is that with the best `metric` on the validation part).

    features [n, D] are standardised by the training part; labels [n, targets], NaN where missing. A logistic or a
    ridge regression for each target, without any randomness. A target that has one class in the training part is
    predicted to be that.
    """
    train = parts["train"]
    mean, sd = features[train].mean(0, dtype=np.float64), features[train].std(0, dtype=np.float64)
    scaled = (features - mean) / np.where(sd > 0, sd, 1.0)
    rows = {part: own for part, own in parts.items() if part != "train"}
    sign = -1 if metric in ERRORS else 1
    best, chosen = -math.inf, STRENGTHS[0]
    found: dict[str, np.ndarray] = {}
    for strength in STRENGTHS:
        models = [_fitted(scaled[train], column, target, strength) for target, column in zip(targets, labels[train].T)]
        predicted = {
            part: np.stack([_predict(model, scaled[own]) for model in models], 1) for part, own in rows.items()
        }
        score = sign * evaluate_predictions(predicted["valid"], labels[rows["valid"]], targets)[metric]
        if score > best or not found:
            best, found, chosen = score, predicted, strength
    return found, chosen


def _fitted(features: np.ndarray, labels: np.ndarray, target: Target, strength: float) -> Any:
    """A trained model, or the value that is predicted for all rows."""
    from sklearn import linear_model

    known = ~np.isnan(labels)
    values = labels[known]
    if len(np.unique(values)) < 2:
        return float(values.mean()) if len(values) else 0.5
    if target.kind == "regression":
        return linear_model.Ridge(1 / strength).fit(features[known], values)
    model = linear_model.LogisticRegression(C=strength, solver="newton-cholesky", max_iter=MOST_ITERATIONS)
    return model.fit(features[known], values.astype(int))


def _predict(model: Any, features: np.ndarray) -> np.ndarray:
    if isinstance(model, float):
        return np.full(len(features), model)
    return model.predict_proba(features)[:, 1] if hasattr(model, "predict_proba") else model.predict(features)
