"""`finetune`: from a table and a checkpoint to the folder of a fine-tuned model."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist import __version__
from exlm_dist.checkpoint.reader import reference
from exlm_dist.finetuning.dataset import Dataset, canonical_keys, read_dataset, split_dataset
from exlm_dist.finetuning.epoch_progress import EpochProgress
from exlm_dist.finetuning.member import evaluate, train_member
from exlm_dist.finetuning.metrics import evaluate_predictions
from exlm_dist.finetuning.model_folder import (
    FORMAT,
    MemberState,
    check_free,
    copy_checkpoint,
    open_partial,
    publish,
    save_member,
)
from exlm_dist.finetuning.prediction import FinetunedModel, Predictions, load_finetuned
from exlm_dist.finetuning.property_model import PropertyModel, build_property_model
from exlm_dist.finetuning.result_tables import write_tables
from exlm_dist.finetuning.settings import SplitSettings, TrainingSettings
from exlm_dist.finetuning.splits import PARTS, Parts, repeated_rows, split_hash
from exlm_dist.finetuning.targets import Target, class_counts, most_common, task_of, with_scaling
from exlm_dist.inference.loading import LoadedCheckpoint, load_checkpoint
from exlm_dist.tables.records import InputOptions, expand_inputs
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.files import sha256_file

SCORED = PARTS[1:]


@dataclass(frozen=True)
class Member:
    """A trained member: its scores by part, and what it predicts for the rows of each part, float64 [m, O]."""

    model: PropertyModel
    seed: int
    history: list[dict[str, Any]]
    best_epoch: int
    scores: dict[str, dict[str, float]]
    values: dict[str, np.ndarray]


def finetune(
    data: Sequence[str],
    targets: Sequence[str],
    checkpoint: Path | str,
    out: Path | str,
    *,
    inputs: Sequence[str] = (),
    options: InputOptions = InputOptions(),
    task: str | None = None,
    training: TrainingSettings = TrainingSettings(),
    split: SplitSettings = SplitSettings(),
    truncate: bool = False,
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> FinetunedModel:
    """Fine-tune a checkpoint (or the newest of a run folder) to predict the columns `targets` of the files `data`, and
    write the model to the folder `out`. A call that was killed goes on when it is given again.

    inputs: the column of texts or molecules, or the two of pairs. task: 'classification' or 'regression' where the
    values leave it open. Errors: see `read_dataset`, `split_dataset`, `open_partial`.
    """
    out = Path(out)
    check_free(out)
    loaded = load_checkpoint(checkpoint, device=device)
    dataset = read_dataset(
        data,
        targets,
        loaded.tokenizer,
        inputs=inputs,
        options=options,
        task=task,
        split_column=split.column,
        max_tokens=loaded.max_tokens,
        truncate=truncate,
    )
    split = replace(split, kind=split.kind or ("scaffold" if loaded.tokenizer.domain == "smiles" else "random"))
    training = replace(training, metric=training.metric_of(task_of(dataset.targets)))
    parts = split_dataset(dataset, split, loaded.tokenizer)
    check_parts(dataset, parts)
    described = with_scaling(dataset.targets, dataset.examples.labels[parts["train"]], training.scale_targets)
    for line in describe(dataset, described, split, parts, loaded):
        say(line)
    files = [sha256_file(path) for path in expand_inputs(data, options)]
    request = _request(loaded, dataset, parts, training, split, truncate, files)
    with open_partial(out, request) as folder:
        copy_checkpoint(loaded.folder, folder)
        members = train_members(loaded, described, dataset, parts, training, folder)
        finetuned = _finetuned(loaded, dataset, described, parts, members, request, folder)
        write_tables(folder, dataset, described, parts, _predictions(described, members))
        publish(folder, out, finetuned)
    for line in _results(finetuned, out):
        say(line)
    return load_finetuned(out, device)


def train_members(
    loaded: LoadedCheckpoint,
    targets: Sequence[Target],
    dataset: Dataset,
    parts: Parts,
    settings: TrainingSettings,
    folder: Path | None = None,
) -> list[Member]:
    """Train the members of an ensemble, one after another, on the same parts. `folder`: MODEL.partial, where their
    states are kept."""
    examples = {part: dataset.examples.take(rows) for part, rows in parts.items()}
    assert settings.metric is not None
    members = []
    for number in range(settings.seeds):
        seed = settings.seed + number
        model = build_property_model(
            loaded.model,
            loaded.config.model,
            sum(target.outputs for target in targets),
            seed=seed,
            pooling=settings.pooling,
            dropout=settings.dropout,
            frozen=settings.frozen,
        )
        progress = train_member(
            model,
            targets,
            examples["train"],
            examples["valid"],
            settings,
            seed,
            store=None if folder is None else MemberState(folder, number),
            watcher=EpochProgress(f"member {number + 1}/{settings.seeds}", settings.epochs, settings.metric),
        )
        values = {part: evaluate(model, targets, examples[part])[0] for part in SCORED if len(examples[part])}
        scores = {part: evaluate_predictions(own, examples[part].labels, targets) for part, own in values.items()}
        members.append(Member(model, seed, progress.history, progress.best_epoch, scores, values))
    return members


def check_parts(dataset: Dataset, parts: Parts) -> None:
    """DataError if a part that is needed is empty, or if no target has labels of two classes in it."""
    labels = dataset.examples.labels
    for part, rows in parts.items():
        if not len(rows):
            if part == "test":
                continue
            raise DataError(
                f"the {part} part of the split is empty ({len(dataset.places)} rows can be used). Give more rows, or "
                "choose another --split or --split-sizes."
            )
        distinct = [len(np.unique(column[~np.isnan(column)])) for column in labels[rows].T]
        if max(distinct) < 2 and task_of(dataset.targets) == "classification":
            raise DataError(
                f"the {part} part of the split ({len(rows)} rows) has labels of one class only: nothing can be "
                f"{'learned from' if part == 'train' else 'measured on'} it. Choose another --split, --split-seed or "
                "--split-sizes."
            )


def describe(
    dataset: Dataset, targets: Sequence[Target], split: SplitSettings, parts: Parts, loaded: LoadedCheckpoint
) -> list[str]:
    """What is printed before training: rows, task, sizes and balance of the parts, repeated rows."""
    used, labels = len(dataset.places), dataset.examples.labels
    lines = [f"{dataset.read} rows read, {used} used, {len(dataset.failed)} not (failed.tsv has the reasons)"]
    if dataset.truncated or dataset.unknown:
        lines.append(f"{dataset.unknown} rows have a token that the vocabulary lacks, {dataset.truncated} are cut off")
    lines.append(f"task: {task_of(targets)} of {len(targets)} target{'s' if len(targets) > 1 else ''}")
    lines += dataset.remarks
    lines.append(f"split: {split.kind}")
    for part, rows in parts.items():
        lines.append(f"  {part}: {len(rows)} rows")
        for target, column in list(zip(targets, labels[rows].T))[:20]:
            missing = int(np.isnan(column).sum())
            lacks = f", {missing} missing" if missing else ""
            lines.append(f"    {target.name} ({target.kind}): {most_common(target, column)}{lacks}")
    if len(targets) > 20:
        lines.append(f"    and {len(targets) - 20} targets more (counts: finetuned.json)")
    for part, count in repeated_rows(canonical_keys(dataset, loaded.tokenizer), parts).items():
        if count:
            lines.append(f"{count} rows of {part} have an input that an earlier part has too")
    return lines


def _request(
    loaded: LoadedCheckpoint,
    dataset: Dataset,
    parts: Parts,
    training: TrainingSettings,
    split: SplitSettings,
    truncate: bool,
    files: Sequence[str],
) -> dict[str, Any]:
    """What a fine-tuning is determined by, as JSON has it."""
    return {
        **asdict(training),
        "split": split.kind,
        "split_column": split.column,
        "split_sizes": list(split.sizes),
        "split_seed": split.seed,
        "split_chirality": split.chirality,
        "split_hash": split_hash(parts),
        "truncate": truncate,
        "inputs": list(dataset.inputs),
        "targets": [f"{target.name} ({target.kind})" for target in dataset.targets],
        "data": list(files),
        "checkpoint": reference(loaded.folder)["checkpoint.sha256"],
        "device": loaded.device.type,
    }


def _finetuned(
    loaded: LoadedCheckpoint,
    dataset: Dataset,
    targets: Sequence[Target],
    parts: Parts,
    members: Sequence[Member],
    request: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Content of `finetuned.json`; writes the members' files, whose hashes are in it."""
    origin = reference(loaded.folder)
    settings = {
        key: value
        for key, value in request.items()
        if key not in ("split_hash", "inputs", "targets", "data", "checkpoint")
    }
    labels = dataset.examples.labels
    predictions = _predictions(targets, members)
    return {
        "format": FORMAT,
        "domain": loaded.tokenizer.domain,
        "inputs": list(dataset.inputs),
        "targets": [
            {
                **target.as_json(),
                "counts": {part: class_counts(target, labels[rows, n]) for part, rows in parts.items()},
            }
            for n, target in enumerate(targets)
        ],
        "settings": settings,
        "data": request["data"],
        "split": {
            "kind": settings["split"],
            "hash": request["split_hash"],
            "sizes": {part: len(rows) for part, rows in parts.items()},
        },
        "checkpoint": {
            "path": origin["checkpoint.path"],
            "step": int(origin["checkpoint.step"]),
            "sha256": origin["checkpoint.sha256"],
        },
        "budget": loaded.config.budget,
        "rows": {"read": dataset.read, "used": len(dataset.places), "failed": len(dataset.failed)},
        "metrics": {part: _summary([member.scores[part] for member in members]) for part in predictions},
        "ensemble": {
            part: evaluate_predictions(own.mean, labels[parts[part]], targets) for part, own in predictions.items()
        },
        "members": [
            {
                "seed": member.seed,
                "best_epoch": member.best_epoch,
                "epochs": len(member.history),
                **member.scores,
                "sha256": save_member(folder, number, member.model.weights(), member.history),
            }
            for number, member in enumerate(members)
        ],
        "versions": _versions(),
    }


def _predictions(targets: Sequence[Target], members: Sequence[Member]) -> dict[str, Predictions]:
    """Of the ensemble, for the rows of each part that is scored."""
    return {
        part: Predictions.of_members(targets, np.stack([member.values[part] for member in members]), {})
        for part in members[0].values
    }


def _summary(scores: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (n - 1; NaN of a single one) over the members of each metric."""
    table = {name: np.array([one[name] for one in scores]) for name in scores[0]}
    return {
        name: {"mean": float(values.mean()), "sd": float(values.std(ddof=1)) if len(values) > 1 else float("nan")}
        for name, values in table.items()
    }


def _versions() -> dict[str, str]:
    import rdkit
    import sklearn
    import torch

    return {
        "exlm_dist": __version__,
        "torch": torch.__version__,
        "rdkit": rdkit.__version__,
        "scikit-learn": sklearn.__version__,
        "python": platform.python_version(),
    }


def _results(finetuned: dict[str, Any], out: Path) -> list[str]:
    """What is printed in the end: each metric of each part, of the members and of their mean."""
    count = len(finetuned["members"])
    lines = [f"{'':10}{'metric':10}{'mean of ' + str(count):>12}{'sd':>10}{'ensemble':>12}"]
    for part, metrics in finetuned["metrics"].items():
        for name, value in metrics.items():
            if name != "skipped":
                ensemble = finetuned["ensemble"][part][name]
                lines.append(f"{part:10}{name:10}{value['mean']:12.4f}{value['sd']:10.4f}{ensemble:12.4f}")
        if skipped := int(metrics["skipped"]["mean"]):
            lines.append(f"{part:10}{skipped} targets left out: their labels here are of one class only")
    return [*lines, f"model: {out}"]
