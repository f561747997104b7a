"""The tables in the folder of a fine-tuned model: predictions, parts, rows that failed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.finetuning.dataset import Dataset
from exlm_dist.finetuning.prediction import Predictions
from exlm_dist.finetuning.splits import Parts
from exlm_dist.finetuning.targets import Target
from exlm_dist.tables.failed_rows import FailedRows
from exlm_dist.tables.table_writer import TableWriter

PREDICTIONS_FILE = "predictions.csv"
SPLIT_FILE = "split.csv"
FAILED_FILE = "failed.tsv"


def write_tables(
    folder: Path, dataset: Dataset, targets: Sequence[Target], parts: Parts, predictions: dict[str, Predictions]
) -> None:
    """predictions.csv: the rows of the validation and the test part with truth and prediction. split.csv: the part of
    every used row. failed.tsv: the rows that were not used."""
    with TableWriter(folder / PREDICTIONS_FILE, overwrite=True) as table:
        for part, own in predictions.items():
            rows = parts[part]
            inputs = {name: [texts[row] for row in rows] for name, texts in zip(dataset.inputs, dataset.texts)}
            truth = {target.name: _truth(target, dataset.examples.labels[rows, n]) for n, target in enumerate(targets)}
            table.write({**_places(dataset, rows, [part] * len(rows)), **inputs, **truth, **own.columns()})
    part_of = np.empty(len(dataset.places), object)
    for part, rows in parts.items():
        part_of[rows] = part
    with TableWriter(folder / SPLIT_FILE, overwrite=True) as table:
        table.write(_places(dataset, np.arange(len(part_of)), part_of.tolist()))
    with FailedRows(folder / FAILED_FILE) as failed:
        for row in dataset.failed:
            failed.add(*row)


def output_names(targets: Sequence[Target]) -> list[str]:
    """Names of the columns that predictions have."""
    outputs = sum(target.outputs for target in targets)
    no_rows = np.zeros((0, outputs))
    return list(Predictions(tuple(targets), no_rows, no_rows, {}).columns())


def column_names_of_results(inputs: Sequence[str], targets: Sequence[Target]) -> list[str]:
    """Names of the columns of predictions.csv."""
    return ["file", "row", "part", *inputs, *(target.name for target in targets), *output_names(targets)]


def _places(dataset: Dataset, rows: np.ndarray, parts: list[str]) -> dict[str, Any]:
    places = [dataset.places[row] for row in rows]
    return {"file": [file for file, _ in places], "row": [row for _, row in places], "part": parts}


def _truth(target: Target, labels: np.ndarray) -> Any:
    """Labels as they were: values, or classes as text."""
    if target.classes is None:
        return labels
    return [None if np.isnan(label) else target.classes[int(label)] for label in labels]
