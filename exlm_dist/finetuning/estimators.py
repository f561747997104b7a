"""Fine-tuning with the behaviour of scikit-learn's estimators: fit, predict, predict_proba, score, clone.

    classifier = ExLMClassifier("runs/zinc", epochs=10).fit(smiles, labels)
    classifier.predict_proba(["CCO"])

The routines are those of `exlm finetune`. A part of the rows that are fitted is set aside to find the best epoch.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted

from exlm_dist.data.counter_rng import hash_of
from exlm_dist.finetuning.criterion import TargetCriterion
from exlm_dist.finetuning.dataset import Examples
from exlm_dist.finetuning.ensemble import train_members
from exlm_dist.finetuning.finetune_settings import TrainingSettings
from exlm_dist.finetuning.inputs import as_columns, encode_inputs
from exlm_dist.finetuning.model_folder import refuse_model
from exlm_dist.finetuning.prediction import FinetunedModel, Predictions
from exlm_dist.finetuning.targets import Target, read_targets, with_scaling
from exlm_dist.inference.loading import load_checkpoint
from exlm_dist.tables.columns import as_text
from exlm_dist.utils.errors import ConfigError, DataError


class _Finetuned(BaseEstimator):
    """What both estimators have in common: parameters, fitting, predictions."""

    _task: str

    def __init__(
        self,
        checkpoint: Path | str,
        *,
        epochs: int = 30,
        batch: int = 32,
        lr: float = 5e-4,
        weight_decay: float = 0.01,
        warmup: float = 0.06,
        clip: float = 1.0,
        dropout: float = 0.1,
        patience: int = 10,
        pooling: str = "mean",
        seeds: int = 1,
        seed: int = 0,
        metric: str | None = None,
        keep: str = "best",
        class_weights: str = "none",
        scale_targets: bool = True,
        frozen: bool = False,
        layer_decay: float = 1.0,
        validation_fraction: float = 0.1,
        truncate: bool = False,
        device: str = "auto",
    ) -> None:
        self.checkpoint = checkpoint
        self.epochs = epochs
        self.batch = batch
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.clip = clip
        self.dropout = dropout
        self.patience = patience
        self.pooling = pooling
        self.seeds = seeds
        self.seed = seed
        self.metric = metric
        self.keep = keep
        self.class_weights = class_weights
        self.scale_targets = scale_targets
        self.frozen = frozen
        self.layer_decay = layer_decay
        self.validation_fraction = validation_fraction
        self.truncate = truncate
        self.device = device

    def fit(self, X: Any, y: Any) -> Any:
        """Fine-tune on texts or molecules (or pairs of texts, or a DataFrame of one or two columns) and their labels,
        [n] or [n, targets] with NaN or None where one is missing. DataError names a row that cannot be read."""
        given = {one.name: getattr(self, one.name) for one in fields(TrainingSettings)}
        settings = TrainingSettings(**given).for_task(self._task)
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction = {self.validation_fraction}: must be between 0 and 1.")
        refuse_model(self.checkpoint)
        loaded = load_checkpoint(self.checkpoint, device=self.device)
        names = _input_names(X)
        columns = as_columns(X, names)
        values = list(y.tolist() if hasattr(y, "tolist") else np.array(y, object).tolist())
        rows = [value if isinstance(value, list) else [value] for value in values]
        if len(rows) != len(columns[0]):
            raise ConfigError(f"X has {len(columns[0])} rows, but y has {len(rows)}.")
        texts = {f"y{n}" if len(rows[0]) > 1 else "y": [as_text(row[n]) for row in rows] for n in range(len(rows[0]))}
        targets, labels, _ = read_targets(texts, [f"row {row}" for row in range(len(rows))], self._task)
        encoded = encode_inputs(loaded.tokenizer, columns, max_tokens=loaded.max_tokens, truncate=self.truncate)
        _refuse(encoded.failures, "X")
        examples = Examples(encoded.tokens, encoded.lengths, labels)
        train, valid = _set_aside(labels, targets, self.validation_fraction, self.seed)
        targets = with_scaling(targets, labels[train], self.scale_targets)
        parts = {"train": examples.take(train), "valid": examples.take(valid)}
        members = train_members(loaded, TargetCriterion(targets), parts, settings)
        models = tuple(member.model for member in members)
        self.model_ = FinetunedModel(loaded.tokenizer, names, tuple(targets), models, loaded.max_tokens, self.truncate)
        self.history_ = [member.history for member in members]
        self._fitted(targets, labels, rows)
        return self

    def _fitted(self, targets: list[Target], labels: np.ndarray, rows: list[list[Any]]) -> None:
        """Set what the estimator knows besides the model."""

    def _predictions(self, X: Any) -> Predictions:
        check_is_fitted(self, "model_")
        predictions = self.model_.predict_rows(as_columns(X, self.model_.inputs))
        _refuse(predictions.failures, "X")
        return predictions


class ExLMClassifier(ClassifierMixin, _Finetuned):
    """Predicts classes. Parameters: those of `TrainingSettings`, and

    checkpoint: run folder or checkpoint folder. validation_fraction: of the rows, set aside to find the best epoch.
    truncate: cut texts that are too long, which are an error otherwise. device: 'auto', 'cpu', 'cuda'.

    After `fit`: classes_ (of several targets a list), model_ (a `FinetunedModel`), history_ (epochs of each member).
    """

    _task = "classification"

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each row, [n] or [n, targets]."""
        chosen = [one.argmax(axis=1) for one in self._predictions(X).probabilities()]
        if len(chosen) == 1:
            return self.classes_[chosen[0]]
        return np.stack([classes[numbers] for classes, numbers in zip(self.classes_, chosen)], axis=1)

    def predict_proba(self, X: Any) -> Any:
        """Probability of each class, [n, classes] in the order of `classes_`; of several targets a list of these."""
        found = self._predictions(X).probabilities()
        return found if len(found) > 1 else found[0]

    def _fitted(self, targets: list[Target], labels: np.ndarray, rows: list[list[Any]]) -> None:
        classes = []
        for number, target in enumerate(targets):
            assert target.classes is not None
            first = [int(np.flatnonzero(labels[:, number] == label)[0]) for label in range(len(target.classes))]
            classes.append(np.array([rows[row][number] for row in first]))
        self.classes_ = classes if len(classes) > 1 else classes[0]


class ExLMRegressor(RegressorMixin, _Finetuned):
    """Predicts values. Parameters: see `ExLMClassifier`. After `fit`: model_, history_."""

    _task = "regression"

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Values, [n] or [n, targets]; `return_std`: also their standard deviation over the members (NaN of one)."""
        predictions = self._predictions(X)
        several = len(predictions.targets) > 1
        mean, spread = (one if several else one[:, 0] for one in (predictions.mean, predictions.spread))
        return (mean, spread) if return_std else mean


def _input_names(X: Any) -> tuple[str, ...]:
    """Names of the columns of a DataFrame, else those of one column of texts or of pairs."""
    if hasattr(X, "columns"):
        names = tuple(X.columns)
        if len(names) not in (1, 2):
            raise ConfigError(f"X has {len(names)} columns; it must have one of texts, or two of pairs.")
        return names
    first = next(iter(X), None)
    return ("first", "second") if isinstance(first, (list, tuple)) and len(first) == 2 else ("text",)


def _refuse(failures: dict[int, str], name: str) -> None:
    """DataError if rows have failed."""
    if failures:
        row, reason = next(iter(failures.items()))
        raise DataError(f"{name}[{row}]: {reason} ({len(failures)} rows cannot be read). Remove or correct these rows.")


def _set_aside(labels: np.ndarray, targets: list[Target], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on, and those to find the best epoch with: at random, of a single target at least one of each
    class. DataError if there are too few rows."""
    order = np.argsort(hash_of(seed, np.arange(len(labels))), kind="stable")
    groups = [order]
    if len(targets) == 1 and targets[0].classes is not None:
        column = labels[order, 0]
        groups = [order[column == label] for label in range(len(targets[0].classes))]
    counts = [max(1 if len(groups) > 1 else 2, round(fraction * len(group))) for group in groups]
    train = np.sort(np.concatenate([group[count:] for group, count in zip(groups, counts)]))
    valid = np.sort(np.concatenate([group[:count] for group, count in zip(groups, counts)]))
    if any(count >= len(group) for group, count in zip(groups, counts)):
        raise DataError(f"{len(labels)} rows are too few: each class needs two, and regression three.")
    return train, valid
