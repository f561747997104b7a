"""`finetune`: from a table and a checkpoint to the folder of a fine-tuned model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.checkpoint.reader import reference
from exlm_dist.finetuning.criterion import Criterion, TargetCriterion
from exlm_dist.finetuning.dataset import ANY_INPUT, Dataset, Examples, canonical_keys, read_dataset, split_dataset
from exlm_dist.finetuning.epoch_progress import EpochProgress
from exlm_dist.finetuning.finetune_settings import DEFAULT_SPLIT, DEFAULT_TRAINING, SplitSettings, TrainingSettings
from exlm_dist.finetuning.finetuned_record import described_data, described_results, finetuned_record
from exlm_dist.finetuning.member import evaluate, train_member
from exlm_dist.finetuning.model_folder import (
    MemberState,
    check_free,
    copy_checkpoint,
    open_partial,
    publish,
    refuse_model,
    save_member,
)
from exlm_dist.finetuning.prediction import FinetunedModel, Predictions, load_finetuned
from exlm_dist.finetuning.property_model import PropertyModel
from exlm_dist.finetuning.result_tables import column_names_of_results, write_tables
from exlm_dist.finetuning.splits import PARTS, Parts, repeated_rows, split_hash
from exlm_dist.finetuning.targets import Target, task_of, with_scaling
from exlm_dist.inference.embed import embed_encoded
from exlm_dist.inference.loading import LoadedCheckpoint, load_checkpoint
from exlm_dist.kernels.determinism import repeatable
from exlm_dist.tables.records import InputOptions, expand_inputs
from exlm_dist.tokenizers.encoding import EncodedTexts
from exlm_dist.utils.errors import ConfigError, DataError
from exlm_dist.utils.files import sha256_file
from exlm_dist.utils.outputs import user_path


@dataclass(frozen=True)
class Member:
    """A trained member: its scores, and what it predicts for the rows of each part but the training part, float64
    [m, O]."""

    model: PropertyModel
    seed: int
    history: list[dict[str, Any]]
    best_epoch: int
    scores: dict[str, dict[str, float]]
    values: dict[str, np.ndarray]


@dataclass(frozen=True)
class _Job:
    """What is to be done. settings: all of them, as JSON has them; repeated: see `repeated_rows`."""

    loaded: LoadedCheckpoint
    dataset: Dataset
    parts: Parts
    targets: list[Target]
    training: TrainingSettings
    settings: dict[str, Any]
    repeated: dict[str, int]


def finetune(
    data: Sequence[str],
    targets: Sequence[str],
    checkpoint: Path | str,
    out: Path | str,
    *,
    inputs: Sequence[str] = (),
    options: InputOptions = ANY_INPUT,
    task: str | None = None,
    training: TrainingSettings = DEFAULT_TRAINING,
    split: SplitSettings = DEFAULT_SPLIT,
    truncate: bool = False,
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> FinetunedModel:
    """Fine-tune a checkpoint (or the newest of a run folder) to predict the columns `targets` of the files `data`, and
    write the model to the folder `out`. A call that was killed goes on when it is given again.

    inputs: the column of texts or molecules, or the two of pairs. task: 'classification' or 'regression' where the
    values leave it open. Errors: see `read_dataset`, `split_dataset`, `check_parts`, `open_partial`.
    """
    out = user_path(out)
    check_free(out)
    refuse_model(checkpoint)
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
    job = _prepared(loaded, dataset, training, split, truncate)
    for line in described_data(dataset, job.targets, job.settings["split"], job.parts, job.repeated):
        say(line)
    files = [sha256_file(path) for path in expand_inputs(data, options)]
    with open_partial(out, _request(job, files)) as folder:
        record = _trained(job, files, folder)
        publish(folder, out, record)
    for line in described_results(record, out):
        say(line)
    return load_finetuned(out, device)


def _prepared(
    loaded: LoadedCheckpoint, dataset: Dataset, training: TrainingSettings, split: SplitSettings, truncate: bool
) -> _Job:
    """What is to be done, checked: split, scaling, metric. Errors: see `finetune`."""
    split = replace(split, kind=split.kind or ("scaffold" if loaded.tokenizer.domain == "smiles" else "random"))
    training = training.for_task(task_of(dataset.targets))
    parts = split_dataset(dataset, split, loaded.tokenizer)
    test = split.kind != "column" and split.sizes[2] > 0
    check_parts(dataset.examples.labels, dataset.targets, parts, test=test)
    targets = with_scaling(dataset.targets, dataset.examples.labels[parts["train"]], training.scale_targets)
    counts = Counter(column_names_of_results(dataset.inputs, targets))
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ConfigError(f"the table of predictions would have two columns {twice[0]!r}: rename the target or input.")
    settings = {**asdict(training), **_split_settings(split), "truncate": truncate, "device": loaded.device.type}
    repeated = repeated_rows(canonical_keys(dataset, loaded.tokenizer), parts)
    return _Job(loaded, dataset, parts, targets, training, settings, repeated)


def _trained(job: _Job, files: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train all members and write everything but `finetuned.json` to `folder`; the content of that file."""
    copy_checkpoint(job.loaded.folder, folder)
    examples = {part: job.dataset.examples.take(rows) for part, rows in job.parts.items()}
    members = train_members(job.loaded, TargetCriterion(job.targets), examples, job.training, folder)
    predictions = {
        part: Predictions.of_members(job.targets, np.stack([member.values[part] for member in members]), {})
        for part in members[0].values
    }
    write_tables(folder, job.dataset, job.targets, job.parts, predictions)
    hashes = [save_member(folder, n, one.model.weights(), one.history) for n, one in enumerate(members)]
    results = [
        {"seed": one.seed, "best_epoch": one.best_epoch, "epochs": len(one.history), **one.scores, "sha256": sha256}
        for one, sha256 in zip(members, hashes)
    ]
    return finetuned_record(job.loaded, job.dataset, job.targets, job.parts, job.settings, files, results, predictions)


def train_members(
    loaded: LoadedCheckpoint,
    criterion: Criterion,
    examples: Mapping[str, Examples],
    settings: TrainingSettings,
    folder: Path | None = None,
    *,
    watched: bool = True,
) -> list[Member]:
    """Train the members of an ensemble, one after another, on the part 'train'; 'valid' decides which epoch is the
    best, and all parts but the first are scored. settings: those of `TrainingSettings.for_task`. folder: MODEL.partial,
    in whose folder `state` their states are kept. watched: show the epochs."""
    assert settings.metric is not None, "settings are those of `for_task`"
    if settings.frozen and criterion.pooled:  # all epochs of all members have the same encoder
        examples = {part: with_features(loaded, own, settings.pooling) for part, own in examples.items()}
    members = []
    for number in range(settings.seeds):
        seed = settings.seed + number
        model = criterion.model(loaded.model, loaded.config.model, settings, seed)
        store = None if folder is None else MemberState(folder, number)
        title = f"member {number + 1}/{settings.seeds}"
        watcher = EpochProgress(title, settings.epochs, settings.metric) if watched else None
        with repeatable(loaded.device):
            train, valid = examples["train"], examples["valid"]
            progress = train_member(model, criterion, train, valid, settings, seed, store=store, watcher=watcher)
        scored = [part for part in examples if part != PARTS[0] and len(examples[part])]
        values = {part: evaluate(model, criterion, examples[part])[0] for part in scored}
        scores = {part: criterion.score(own, examples[part]) for part, own in values.items()}
        members.append(Member(model, seed, progress.history, progress.best_epoch, scores, values))
    return members


def with_features(loaded: LoadedCheckpoint, examples: Examples, pooling: str) -> Examples:
    """The same rows with what the encoder makes of them, read once."""
    if examples.features is not None:
        return examples
    encoded = EncodedTexts(examples.tokens, examples.lengths, np.arange(len(examples)))
    return replace(examples, features=embed_encoded(loaded, encoded, pooling, None))


def check_parts(
    labels: np.ndarray,
    targets: Sequence[Target],
    parts: Parts,
    *,
    test: bool,
    remedy: str = "Choose another --split, --split-seed or --split-sizes.",
) -> None:
    """DataError if a part is empty (the one for `test` only if it is asked for), or if no target has two distinct
    `labels` [n, targets] in it. `remedy`: what its message advises."""
    for part, rows in parts.items():
        if not len(rows) and (part != "test" or test):
            raise DataError(
                f"the {part} part of the split is empty ({len(labels)} rows can be used). Give more rows. {remedy}"
            )
        if len(rows) and max(len(np.unique(column[~np.isnan(column)])) for column in labels[rows].T) < 2:
            of_one = "of one class" if task_of(targets) == "classification" else "with one value"
            raise DataError(
                f"the {part} part of the split ({len(rows)} rows) has labels {of_one} only: nothing can be "
                f"{'learned from' if part == 'train' else 'measured on'} it. {remedy}"
            )


def _split_settings(split: SplitSettings) -> dict[str, Any]:
    own = {key: value for key, value in asdict(split).items() if key != "kind"}
    return {"split": split.kind, **{f"split_{key}": value for key, value in own.items()}, "split_sizes": [*split.sizes]}


def _request(job: _Job, files: Sequence[str]) -> dict[str, Any]:
    """All that determines what is learned, as JSON has it."""
    return {
        **job.settings,
        "inputs": list(job.dataset.inputs),
        "targets": [f"{target.name} ({target.kind})" for target in job.targets],
        "data": list(files),
        "split_hash": split_hash(job.parts),
        "checkpoint": reference(job.loaded.folder)["checkpoint.sha256"],
    }
