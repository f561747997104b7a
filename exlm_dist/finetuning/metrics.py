"""Metrics of predictions against labels, with scikit-learn; a target on which one is undefined is left out of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from exlm_dist.finetuning.finetune_settings import METRICS
from exlm_dist.finetuning.targets import Target, output_slices, task_of


def evaluate_predictions(values: np.ndarray, labels: np.ndarray, targets: Sequence[Target]) -> dict[str, float]:
    """The metrics of the task, each the mean over the targets on which it is defined; NaN if there is none.

    values [n, O] as of `losses.predicted_values`, labels [n, targets] with NaN where missing. `skipped` counts targets
    without labels of both (two of several) classes, or without two distinct values, for which no metric is given.
    """
    found: list[dict[str, float]] = []
    for target, where, column in zip(targets, output_slices(targets), labels.T):
        known = ~np.isnan(column)
        if len(np.unique(column[known])) < 2:
            continue
        if target.kind == "regression":
            found.append(_regression(values[known, where][:, 0], column[known]))
        else:
            found.append(_classification(values[known, where], column[known].astype(int), target))
    names = METRICS[task_of(targets)]
    means = {name: _mean([one[name] for one in found]) for name in names}
    return {**means, "skipped": float(len(targets) - len(found))}


def predicted_classes(probabilities: np.ndarray) -> np.ndarray:
    """Number of the most probable class, [n], from [n, 1] (binary: the probability of the second) or [n, classes]."""
    return (probabilities[:, 0] >= 0.5).astype(int) if probabilities.shape[1] == 1 else probabilities.argmax(1)


def _classification(probabilities: np.ndarray, labels: np.ndarray, target: Target) -> dict[str, float]:
    from sklearn import metrics

    predicted = predicted_classes(probabilities)
    binary = target.kind == "binary"
    if binary:
        pairs = [(labels, probabilities[:, 0])]
    else:  # each class that occurs against all others, in equal parts
        pairs = [(labels == number, probabilities[:, number]) for number in np.unique(labels)]
    return {
        "roc_auc": _mean([metrics.roc_auc_score(truth, score) for truth, score in pairs]),
        "pr_auc": _mean([metrics.average_precision_score(truth, score) for truth, score in pairs]),
        "accuracy": metrics.accuracy_score(labels, predicted),
        "mcc": metrics.matthews_corrcoef(labels, predicted),
        "f1": metrics.f1_score(labels, predicted, average="binary" if binary else "macro", zero_division=0),
    }


def _regression(values: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from sklearn import metrics

    ranks = [np.unique(column, return_inverse=True)[1] for column in (values, labels)]
    return {
        "rmse": metrics.root_mean_squared_error(labels, values),
        "mae": metrics.mean_absolute_error(labels, values),
        "r2": metrics.r2_score(labels, values),
        "pearson": _correlation(values, labels),
        "spearman": _correlation(*map(_mean_ranks, ranks)),
    }


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation; NaN if one side is constant."""
    if not first.std() or not second.std():
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])


def _mean_ranks(order: np.ndarray) -> np.ndarray:
    """Mean rank of each element among all, from the number of its value among the distinct ones."""
    counts = np.bincount(order)
    return (np.cumsum(counts) - (counts - 1) / 2)[order]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
