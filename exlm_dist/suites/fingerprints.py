"""What a model without any pretraining reaches: trees on Morgan fingerprints, one model for each target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from exlm_dist.finetuning.splits import Parts
from exlm_dist.finetuning.targets import Target
from exlm_dist.tokenizers.molecules import morgan_counts

RADIUS, SIZE = 2, 2048
#: As MoleculeNet's own random forests have it; the classes of a target weigh the same.
TREES = 500
#: Fraction of the counts that each split of a boosted tree may choose from: faster, and what the seed decides.
CHOICE = 0.2


def fingerprint_features(texts: Sequence[str]) -> np.ndarray:
    """Counts of circular environments (ECFP4), uint8 [n, 2048]."""
    return np.stack([morgan_counts(text, radius=RADIUS, size=SIZE) for text in texts])


def predict_from_fingerprints(
    kind: str,
    features: np.ndarray,
    labels: np.ndarray,
    targets: Sequence[Target],
    parts: Parts,
    *,
    seed: int,
    threads: int,
) -> dict[str, np.ndarray]:
    """Train 'forest' or 'boosting' on the training part, and predict the others, float64 [rows, targets]: values, or
    the probability of the second class. A target that has one class in the training part is predicted to be that.

    features [n, F], labels [n, targets] with NaN where missing. The validation part has no say: nothing is chosen.
    """
    train = parts["train"]
    features = features[:, np.ptp(features[train], axis=0) > 0]  # the others tell nothing apart
    predicted = {part: np.empty((len(rows), len(targets))) for part, rows in parts.items() if part != "train"}
    for number, target in enumerate(targets):
        known = train[~np.isnan(labels[train, number])]
        values = labels[known, number]
        constant = len(np.unique(values)) < 2
        model = None if constant else _model(kind, target.task, seed, threads).fit(features[known], values)
        for part, own in predicted.items():
            own[:, number] = _predict(model, target, features[parts[part]], values)
    return predicted


def _predict(model: Any, target: Target, features: np.ndarray, trained_on: np.ndarray) -> np.ndarray:
    if model is None:
        return np.full(len(features), trained_on.mean() if len(trained_on) else 0.5)
    return model.predict(features) if target.kind == "regression" else model.predict_proba(features)[:, 1]


def _model(kind: str, task: str, seed: int, threads: int) -> Any:
    from sklearn import ensemble

    if kind == "boosting":
        boosting = {
            "regression": ensemble.HistGradientBoostingRegressor,
            "classification": ensemble.HistGradientBoostingClassifier,
        }[task]
        return boosting(max_features=CHOICE, early_stopping=False, random_state=seed)
    if task == "regression":
        return ensemble.RandomForestRegressor(TREES, max_features="sqrt", n_jobs=threads, random_state=seed)
    return ensemble.RandomForestClassifier(TREES, class_weight="balanced", n_jobs=threads, random_state=seed)
