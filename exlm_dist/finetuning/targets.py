"""What is predicted: columns of labels, their kind as their values show it, and their classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from exlm_dist.finetuning.finetune_settings import TASKS
from exlm_dist.tables.columns import kind_of, listed
from exlm_dist.utils.errors import ConfigError, DataError

#: Whole numbers with at most this many distinct values, and this many rows of each on average, are taken for classes.
FEW_CLASSES, ROWS_PER_CLASS = 10, 10
#: More distinct values than this, and more than half as many as rows, are no classes.
MANY_VALUES = 20
#: Classes of which the number of labels is printed.
SHOWN_CLASSES = 10


@dataclass(frozen=True)
class Target:
    """A column that is predicted. `classes`: labels as text, in the order of their numbers; `mean`, `std`: of the
    training part, by which regression targets are scaled."""

    name: str
    kind: str  # 'binary', 'multiclass' or 'regression'
    classes: tuple[str, ...] | None = None
    mean: float | None = None
    std: float | None = None

    @property
    def task(self) -> str:
        """'classification' or 'regression'."""
        return "regression" if self.kind == "regression" else "classification"

    @property
    def outputs(self) -> int:
        """How many outputs of the model it takes: one for each of several classes, else one."""
        return len(self.classes) if self.kind == "multiclass" and self.classes else 1

    def as_json(self) -> dict[str, Any]:
        """As in `finetuned.json`."""
        return {**asdict(self), "classes": None if self.classes is None else list(self.classes)}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Target:
        """The inverse of `as_json`, which ignores what else is there."""
        classes = content["classes"]
        return Target(
            content["name"],
            content["kind"],
            None if classes is None else tuple(classes),
            content["mean"],
            content["std"],
        )


def task_of(targets: Sequence[Target]) -> str:
    """The task that all targets have."""
    return targets[0].task


def output_slices(targets: Sequence[Target]) -> list[slice]:
    """Where the outputs of each target are among those of the model."""
    ends = np.cumsum([target.outputs for target in targets]).tolist()
    return [slice(end - target.outputs, end) for target, end in zip(targets, ends)]


def read_targets(
    columns: Mapping[str, Sequence[str | None]], places: Sequence[str], task: str | None
) -> tuple[list[Target], np.ndarray, list[str]]:
    """(targets, labels, remarks) of the columns of labels as they are in a table.

    Labels are float64 [n, targets]: number of the class, or value; NaN where the label is missing. Without `task`,
    values that are not numbers or only two distinct ones are classes; so are whole numbers with at most 10 distinct
    values and 10 rows of each on average, which is remarked upon as it may be wrong. Everything else is regression.
    `places`: where each row is, for messages. DataError for values that do not fit.
    """
    if task is not None and task not in TASKS:
        raise ConfigError(f"task = {task!r}: must be one of {', '.join(TASKS)}.")
    found = [_read_target(name, values, places, task) for name, values in columns.items()]
    targets = [target for target, _, _ in found]
    if len({target.task for target in targets}) > 1:
        kinds = ", ".join(f"{target.name!r}: {target.task}" for target in targets)
        raise DataError(
            f"the targets are of different tasks ({kinds}). Fine-tune one model for each task, or say what all of "
            "them are with --task."
        )
    return targets, np.stack([labels for _, labels, _ in found], axis=1), [text for *_, text in found if text]


def with_scaling(targets: Sequence[Target], labels: np.ndarray, scale: bool) -> list[Target]:
    """Regression targets with mean and standard deviation of `labels` [n, targets], those of the training part; 0 and
    1 if not `scale`. DataError if one has the same value in all rows."""
    scaled = []
    for target, column in zip(targets, labels.T):
        if target.kind != "regression":
            scaled.append(target)
            continue
        known = column[~np.isnan(column)]
        if not len(known) or known.min() == known.max():
            raise DataError(
                f"target {target.name!r} has {'the same value' if len(known) else 'no value'} in all rows of the "
                "training part: there is nothing to learn. Choose another target or another --split."
            )
        mean, std = (float(known.mean()), float(known.std())) if scale else (0.0, 1.0)
        scaled.append(replace(target, mean=mean, std=std))
    return scaled


def label_weights(targets: Sequence[Target], labels: np.ndarray, class_weights: str) -> np.ndarray:
    """Weight of each label in the loss, float64 [n, targets]: 0 where it is missing, else 1; if 'balanced', n / (C n_c)
    for a label of class c of C classes, of which the target has n_c among its n labels in these rows."""
    weights = np.where(np.isnan(labels), 0.0, 1.0)
    if class_weights == "balanced":
        for target, column, weight in zip(targets, labels.T, weights.T):
            known = ~np.isnan(column)
            present, inverse, counts = np.unique(column[known], return_inverse=True, return_counts=True)
            if target.kind != "regression":
                weight[known] = known.sum() / (len(present) * counts[inverse])
    return weights


def class_counts(target: Target, labels: np.ndarray) -> dict[str, int]:
    """How many labels of a column [n] are of each class; of regression, under 'values', how many there are."""
    known = labels[~np.isnan(labels)]
    if target.classes is None:
        return {"values": len(known)}
    counts = np.bincount(known.astype(int), minlength=len(target.classes))
    return dict(zip(target.classes, counts.tolist()))


def _read_target(
    name: str, values: Sequence[str | None], places: Sequence[str], task: str | None
) -> tuple[Target, np.ndarray, str]:
    known = {row: value.strip() for row, value in enumerate(values) if value and kind_of(value) != "missing"}
    if not known:
        raise DataError(f"target {name!r} has no label in any row. Name another column with --target.")
    numbers = {row: _number(value) for row, value in known.items()}
    wrong = [row for row, number in numbers.items() if number is None or not math.isfinite(number)]
    remark = ""
    if task is None:
        task, remark = _inferred(name, known, numbers, bool(wrong))
    labels = np.full(len(values), np.nan)
    if task == "regression":
        if wrong:
            raise DataError(
                f"{places[wrong[0]]}: target {name!r} is {known[wrong[0]]!r}, which is no finite number "
                f"({len(wrong)} such rows). Correct these rows, or say --task classification if they are classes."
            )
        labels[list(numbers)] = list(numbers.values())
        return Target(name, "regression"), labels, remark
    texts = known if wrong else {row: _as_class(number) for row, number in numbers.items() if number is not None}
    classes = sorted(set(texts.values()), key=None if wrong else float)
    _check_classes(name, classes, len(texts), numeric=not wrong)
    index = {label: number for number, label in enumerate(classes)}
    labels[list(texts)] = [index[text] for text in texts.values()]
    return Target(name, "binary" if len(classes) == 2 else "multiclass", tuple(classes)), labels, remark


def _inferred(name: str, known: Mapping[int, str], numbers: Mapping[int, float | None], words: bool) -> tuple[str, str]:
    distinct = len(set(known.values()) if words else set(numbers.values()))
    if words or distinct <= 2:
        return "classification", ""
    whole = all(number is not None and number.is_integer() for number in numbers.values())
    if whole and distinct <= FEW_CLASSES and len(known) >= ROWS_PER_CLASS * distinct:
        return "classification", (
            f"target {name!r} has {distinct} distinct whole numbers, taken for classes; if they are values, say "
            "--task regression"
        )
    return "regression", ""


def _check_classes(name: str, classes: Sequence[str], rows: int, numeric: bool) -> None:
    if len(classes) == 1:
        raise DataError(
            f"target {name!r} is {classes[0]!r} in all {rows} rows that have a label: with one class there is nothing "
            "to learn. Name another column with --target, or add rows of another class."
        )
    if len(classes) > MANY_VALUES and len(classes) > rows / 2:
        remedy = "say --task regression" if numeric else "name another column with --target"
        raise DataError(
            f"target {name!r} has {len(classes)} distinct values in {rows} rows ({listed(classes, 3)}): these are no "
            f"classes; {remedy}."
        )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _as_class(number: float) -> str:
    """A number as the label of a class: 1 and 1.0 are the same one."""
    return str(int(number)) if number.is_integer() else repr(number)


def labels_as_text(target: Target, labels: np.ndarray) -> str:
    """The labels of a column [n] in a few words: how many of each class, or how many values and their range."""
    counts = class_counts(target, labels)
    if target.classes is None:
        known = labels[~np.isnan(labels)]
        return f"{len(known)} values" + (f", {known.min():.4g} to {known.max():.4g}" if len(known) else "")
    more = f" and {len(counts) - SHOWN_CLASSES} classes more" if len(counts) > SHOWN_CLASSES else ""
    return ", ".join(f"{label}: {count}" for label, count in list(counts.items())[:SHOWN_CLASSES]) + more
