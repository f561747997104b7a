"""Tables of sentences and labels, one for each part: which rows can be used, and their labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exlm_dist.finetuning.dataset import FailedRow
from exlm_dist.finetuning.ensemble import check_parts
from exlm_dist.finetuning.splits import Parts
from exlm_dist.finetuning.targets import Target
from exlm_dist.suites.task_data import TaskData, check_used, hash_of_files, is_missing
from exlm_dist.tables.columns import listed
from exlm_dist.tables.input_files import file_format
from exlm_dist.tables.records import InputOptions, Record, column_names, read_records, text_problem
from exlm_dist.utils.errors import DataError

if TYPE_CHECKING:
    from exlm_dist.suites.glue_task import GlueTask


def read_sentences(task: GlueTask, files: tuple[Path, ...]) -> TaskData:
    """The rows of the files of a task, one for each part. DataError for a missing column, a label that the task does
    not have, and if no row or less than half of a file can be used."""
    sentences: list[tuple[str, ...]] = []
    labels: list[float] = []
    places: list[tuple[str, int]] = []
    failed: list[FailedRow] = []
    parts: Parts = {}
    for (part, _), path in zip(task.parts, files):
        first, bad = len(labels), list[FailedRow]()
        for record, texts, label, problem in _rows(task, path):
            if problem:
                bad.append(FailedRow(record.file, record.row, problem, record.raw or "\t".join(texts)))
                continue
            sentences.append(texts)
            labels.append(label)
            places.append((record.file, record.row))
        check_used(path, len(labels) - first, bad, "Take the file as GLUE has it.")
        parts[part] = np.arange(first, len(labels))
        failed += bad
    names = ("sentence1", "sentence2")[: len(task.inputs[0])]
    data = TaskData(
        files=files,
        sha256=hash_of_files(files),
        columns={name: [texts[side] for texts in sentences] for side, name in enumerate(names)},
        keys=["\0".join(" ".join(text.split()) for text in texts) for texts in sentences],
        places=places,
        targets=(_target(task),),
        labels=np.array(labels)[:, None],
        failed=failed,
        official=parts,
    )
    check_parts(data.labels, data.targets, parts, test=False, remedy="Take the files as GLUE has them.")
    return data


def _target(task: GlueTask) -> Target:
    if not task.labels:
        return Target("score", "regression")
    return Target("label", "binary" if len(task.labels) == 2 else "multiclass", task.labels)


def _rows(task: GlueTask, path: Path) -> Iterator[tuple[Record, tuple[str, ...], float, str]]:
    """(record, its sentences, its label, why it cannot be used) of each row of a file."""
    options, inputs, label = _columns(task, path)
    for record in read_records(path, options):
        texts = tuple((record.values.get(name) or "").strip() for name in inputs)
        value = record.values.get(label)
        problem = record.problem or next(filter(None, map(_text_problem, texts)), "")
        if not problem and is_missing(value):
            problem = "no label"
        yield record, texts, 0.0 if problem else _label(task, record, label, (value or "").strip()), problem


def _columns(task: GlueTask, path: Path) -> tuple[InputOptions, list[str], str]:
    """(how the file is read, its columns of sentences, that of labels)."""
    table = file_format(path) in ("tsv", "csv", "txt")
    options = InputOptions(format="tsv" if file_format(path) == "txt" else None)
    if table:
        options = replace(options, header=not task.headerless)
    names = column_names(path, options)
    numbers = dict(task.headerless) if table else {}
    inputs = [[numbers.get(name, name) for name in one] for one in task.inputs]
    labels = [numbers.get(name, name) for name in task.label_names]
    chosen = next((one for one in inputs if set(one) <= set(names)), None)
    label = next((name for name in labels if name in names), None)
    if chosen is None or label is None:
        wanted = labels if label is None else [" and ".join(one) for one in inputs]
        raise DataError(
            f"{path}: has no column {' or '.join(dict.fromkeys(wanted))}, which {task.name} has. Its columns: "
            f"{listed(names)}. Take the file as GLUE or the Hugging Face hub has it."
        )
    return options, chosen, label


def _label(task: GlueTask, record: Record, column: str, value: str) -> float:
    """Number of a class, or value. DataError if the task has no such label."""
    where = f"{record.file}: row {record.row}: the label (column {column!r}) is {value!r}"
    if value in task.labels:
        return float(task.labels.index(value))
    try:
        number = float(value)
    except ValueError:
        number = np.nan
    if task.labels and number in range(len(task.labels)):
        return number
    if not task.labels and task.limits[0] <= number <= task.limits[1]:
        return number
    allowed = f"{', '.join(task.labels)}" if task.labels else f"from {task.limits[0]:g} to {task.limits[1]:g}"
    hidden = " -1 stands for a label that is hidden, as in test files." if number == -1 else ""
    raise DataError(f"{where}; those of {task.name} are {allowed}.{hidden} Take the file as GLUE has it.")


def _text_problem(text: str) -> str:
    return text_problem(text) or ("" if text else "empty")
