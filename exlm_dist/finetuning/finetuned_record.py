"""What is recorded of a fine-tuning in `finetuned.json`, and what is printed of it before and after."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.checkpoint.reader import reference
from exlm_dist.finetuning.dataset import Dataset
from exlm_dist.finetuning.metrics import evaluate_predictions
from exlm_dist.finetuning.model_folder import FORMAT
from exlm_dist.finetuning.prediction import Predictions
from exlm_dist.finetuning.splits import Parts, split_hash
from exlm_dist.finetuning.targets import Target, class_counts, labels_as_text, task_of
from exlm_dist.inference.loading import LoadedCheckpoint
from exlm_dist.utils.version import VERSION, git_commit

#: Targets of which each part's labels are printed.
SHOWN = 20


def described_data(
    dataset: Dataset, targets: Sequence[Target], split: str, parts: Parts, repeated: Mapping[str, int]
) -> list[str]:
    """What is printed before training: rows, task, sizes and class balance of the parts, repeated rows."""
    used, labels = len(dataset.places), dataset.examples.labels
    unused = f", {len(dataset.failed)} not (reasons: failed.tsv)" if dataset.failed else ""
    lines = [f"rows: {dataset.read} read, {used} used{unused}"]
    if dataset.truncated or dataset.unknown:
        lines.append(f"  {dataset.unknown} have a token that the vocabulary lacks, {dataset.truncated} lost their end")
    lines.append(f"task: {task_of(targets)}, {len(targets)} target{'s' if len(targets) > 1 else ''}")
    lines += [f"  {remark}" for remark in dataset.remarks]
    lines.append(f"split: {split}")
    for part, rows in parts.items():
        lines.append(f"  {part}: {len(rows)} rows")
        for target, column in list(zip(targets, labels[rows].T))[:SHOWN]:
            missing = int(np.isnan(column).sum())
            absent = _absent_classes(target, labels[parts["train"], targets.index(target)], column)
            lines.append(
                f"    {target.name} ({target.kind}): {labels_as_text(target, column)}"
                + (f"; {missing} missing" if missing else "")
                + (f"; not in the training part: {', '.join(absent)}" if absent else "")
            )
    if len(targets) > SHOWN:
        lines.append(f"    and {len(targets) - SHOWN} targets more (their counts: finetuned.json)")
    lines += [
        f"  {count} rows of {part} have an input that an earlier part has too"
        for part, count in repeated.items()
        if count
    ]
    return lines


def finetuned_record(
    loaded: LoadedCheckpoint,
    dataset: Dataset,
    targets: Sequence[Target],
    parts: Parts,
    settings: Mapping[str, Any],
    files: Sequence[str],
    members: Sequence[Mapping[str, Any]],
    predictions: Mapping[str, Predictions],
) -> dict[str, Any]:
    """Content of `finetuned.json`. `members`: seed, epochs, scores by part and hash of each; `files`: hashes of the
    data; `predictions`: of the ensemble by part."""
    origin, labels = reference(loaded.folder), dataset.examples.labels
    counts = [
        {part: class_counts(target, labels[rows, n]) for part, rows in parts.items()}
        for n, target in enumerate(targets)
    ]
    return {
        "format": FORMAT,
        "domain": loaded.tokenizer.domain,
        "inputs": list(dataset.inputs),
        "targets": [{**target.as_json(), "counts": own} for target, own in zip(targets, counts)],
        "settings": dict(settings),
        "data": list(files),
        "split": {
            "kind": settings["split"],
            "hash": split_hash(parts),
            "sizes": {part: len(rows) for part, rows in parts.items()},
        },
        "checkpoint": {
            "path": origin["checkpoint.path"],
            "step": int(origin["checkpoint.step"]),
            "sha256": origin["checkpoint.sha256"],
        },
        "budget": loaded.config.budget,
        "rows": {"read": dataset.read, "used": len(dataset.places), "failed": len(dataset.failed)},
        "metrics": {part: _over_members([member[part] for member in members]) for part in predictions},
        "ensemble": {
            part: evaluate_predictions(own.mean, labels[parts[part]], targets) for part, own in predictions.items()
        },
        "members": list(members),
        "versions": _versions(),
    }


def described_results(record: Mapping[str, Any], out: Path) -> list[str]:
    """What is printed in the end: each metric of each part, mean and sd over the members, and of the ensemble."""
    count = len(record["members"])
    lines = [f"{'part':8}{'metric':10}{f'mean of {count}':>12}{'sd':>10}{'ensemble':>12}"]
    for part, metrics in record["metrics"].items():
        for name, value in metrics.items():
            if name != "skipped":
                numbers = (value["mean"], value["sd"], record["ensemble"][part][name])
                mean, sd, whole = ("-" if math.isnan(number) else f"{number:.4f}" for number in numbers)
                lines.append(f"{part:8}{name:10}{mean:>12}{sd:>10}{whole:>12}")
        if skipped := int(metrics["skipped"]["mean"]):
            lines.append(f"{part:8}{skipped} targets are left out: their labels here are all the same")
    return [*lines, f"model: {out}"]


def _absent_classes(target: Target, train: np.ndarray, part: np.ndarray) -> list[str]:
    """Classes that a part has and the training part lacks."""
    if target.classes is None:
        return []
    known, here = class_counts(target, train), class_counts(target, part)
    return [label for label in target.classes if here[label] and not known[label]]


def _over_members(scores: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (n - 1; NaN of a single one) of each metric."""
    table = {name: np.array([one[name] for one in scores]) for name in scores[0]}
    return {
        name: {"mean": float(values.mean()), "sd": float(values.std(ddof=1)) if len(values) > 1 else math.nan}
        for name, values in table.items()
    }


def _versions() -> dict[str, str]:
    import sklearn
    import torch

    return {
        "exlm_dist": VERSION,
        "git": git_commit(),
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "python": platform.python_version(),
    }
