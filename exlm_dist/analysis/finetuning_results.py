"""What the files of a fine-tuned model say: labels and predictions by part, and the epochs of its members."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.finetuning.metrics import evaluate_predictions
from exlm_dist.finetuning.model_folder import HISTORY_FILE, member_folder, read_finetuned
from exlm_dist.finetuning.result_tables import PREDICTIONS_FILE
from exlm_dist.finetuning.targets import Target, task_of
from exlm_dist.utils.errors import CheckpointError


@dataclass(frozen=True)
class TargetResults:
    """A target in one part, only the rows that have a label of it.

    labels: float64 [n], values or numbers of classes. values: float64 [n, outputs], of the ensemble: values, or the
    probabilities of the second of two classes or of each class. spread: float64 [n], standard deviation over the
    members of the value, or of the probability of the class predicted; NaN of a single member.
    """

    target: Target
    labels: np.ndarray
    values: np.ndarray
    spread: np.ndarray

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Metrics of the ensemble; NaN where they are undefined, as with labels of one class only."""
        return evaluate_predictions(self.values, self.labels[:, None], [self.target])


@dataclass(frozen=True)
class FinetuningResults:
    """A fine-tuned model as its files describe it. `record`: `finetuned.json`; `histories`: the epochs of each
    member; `parts`: for each part that was predicted, its targets."""

    folder: Path
    record: dict[str, Any]
    targets: tuple[Target, ...]
    histories: list[list[dict[str, Any]]]
    parts: dict[str, list[TargetResults]]

    @property
    def metric(self) -> str:
        """Name of the metric that decided which epoch is the best."""
        return self.record["settings"]["metric"]

    @property
    def task(self) -> str:
        """'classification' or 'regression'."""
        return task_of(self.targets)

    @property
    def shown_part(self) -> str:
        """The part that figures show: test, or the validation part of a model that has no test part."""
        return "test" if "test" in self.parts else "valid"


def read_results(folder: Path) -> FinetuningResults:
    """Read the results of a fine-tuned model. CheckpointError if a file is missing or damaged."""
    record = read_finetuned(folder)
    targets = tuple(Target.from_json(one) for one in record["targets"])
    try:
        histories = [
            json.loads((member_folder(folder, number) / HISTORY_FILE).read_text(encoding="utf-8"))
            for number in range(len(record["members"]))
        ]
        with open(folder / PREDICTIONS_FILE, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
        names = [part for part in ("valid", "test") if part in record["metrics"]]
        chosen = {part: [row for row in rows if row["part"] == part] for part in names}
        parts = {part: [_of_target(target, own) for target in targets] for part, own in chosen.items()}
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise CheckpointError(
            f"{folder}: its results cannot be read ({type(error).__name__}: {error}). Copy the model again, or "
            "fine-tune once more."
        ) from error
    return FinetuningResults(folder, record, targets, histories, parts)


def _of_target(target: Target, rows: Sequence[Mapping[str, str]]) -> TargetResults:
    known = [row for row in rows if row[target.name] != ""]
    if target.classes is None:
        labels, columns = _numbers(known, target.name), [f"{target.name}_mean"]
    else:
        numbers = {label: float(number) for number, label in enumerate(target.classes)}
        labels = np.array([numbers[row[target.name]] for row in known], np.float64)
        several = [f"{target.name}_probability_{label}" for label in target.classes]
        columns = several if target.kind == "multiclass" else [f"{target.name}_probability"]
    values = np.stack([_numbers(known, column) for column in columns], axis=1)
    return TargetResults(target, labels, values, _numbers(known, f"{target.name}_spread"))


def _numbers(rows: Sequence[Mapping[str, str]], column: str) -> np.ndarray:
    return np.array([float(row[column] or "nan") for row in rows], np.float64)
