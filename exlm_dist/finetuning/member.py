"""One member of an ensemble, trained: epochs, early stopping, and a state from which a killed one goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from exlm_dist.data.counter_rng import hash_of
from exlm_dist.finetuning.criterion import Criterion
from exlm_dist.finetuning.dataset import Examples
from exlm_dist.finetuning.finetune_settings import ERRORS, TrainingSettings
from exlm_dist.finetuning.property_model import HEAD, PropertyModel
from exlm_dist.inference.embed import BATCH_TOKENS
from exlm_dist.inference.sequences import length_batches, take_sequences, unmasked_stream
from exlm_dist.inference.side_by_side import on_cores
from exlm_dist.utils.errors import RunStopped
from exlm_dist.utils.seeding import seed_from

#: Those of fine-tuning in RoBERTa and its successors.
BETAS, EPS = (0.9, 0.98), 1e-6
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """How far a member is: what `history.json` has of each epoch, and the best one."""

    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)  # trained weights after the best epoch

    def finished(self, settings: TrainingSettings) -> bool:
        """Whether all epochs are done, or patience has run out."""
        done = len(self.history)
        return done >= settings.epochs or 0 < settings.patience <= done - self.best_epoch


class StateStore(Protocol):
    """Where the state of a member is kept after each epoch."""

    def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Replace the state, as a whole or not at all."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last one; None if there is none."""


class Watcher(Protocol):
    """Who follows the training of a member."""

    def batch(self, epoch: int, batches: int, loss: float) -> None:
        """A batch of `batches` is done; its loss per label."""

    def epoch(self, record: dict[str, Any], best_epoch: int) -> None:
        """An epoch is done."""


def train_member(
    model: PropertyModel,
    criterion: Criterion,
    train: Examples,
    valid: Examples,
    settings: TrainingSettings,
    seed: int,
    *,
    store: StateStore | None = None,
    watcher: Watcher | None = None,
) -> Progress:
    """Train `model` and leave it with the weights of the best epoch, by the metric of `valid`, or of the last one.

    What is trained depends on the arguments alone: a member that goes on from the state in `store` ends with the same
    weights. RunStopped if the loss is not finite.
    """
    optimizer = _optimizer(model, settings)
    progress = _resumed(model, optimizer, store)
    weights = criterion.weights(train.labels, settings)
    metric = settings.metric
    assert metric is not None, "settings are those of `for_task`"
    while not progress.finished(settings):
        started, epoch = time.monotonic(), len(progress.history) + 1
        loss = _train_epoch(model, optimizer, criterion, train, weights, settings, seed, epoch, watcher)
        values, valid_loss = evaluate(model, criterion, valid)
        record = {
            "epoch": epoch,
            "lr": _rate(settings, len(train), epoch * steps_of_epoch(len(train), settings)),
            "train_loss": loss,
            "valid_loss": valid_loss,
            "valid": criterion.score(values, valid),
            "seconds": time.monotonic() - started,
        }
        if settings.keep == "last" or _better(metric, record, progress.history):
            progress.best_epoch = epoch
            progress.best = {name: value.detach().clone() for name, value in model.trainable().items()}
        progress.history.append(record)
        if store is not None:
            store.save(_tensors(model, optimizer, progress), _facts(progress))
        if watcher is not None:
            watcher.epoch(record, progress.best_epoch)
    put_weights(model, progress.best)
    model.eval()
    return progress


@torch.inference_mode()
def evaluate(model: PropertyModel, criterion: Criterion, examples: Examples) -> tuple[np.ndarray, float]:
    """(what is predicted for each row, float64 [m, O]; mean loss of a label)."""
    model.eval()
    values = np.empty((len(examples), criterion.width))
    total = 0.0
    for chosen, outputs in _evaluated(model, examples):
        labels = torch.from_numpy(examples.labels[chosen]).to(outputs.device)
        total += float(criterion.loss(outputs, labels, torch.ones_like(labels)))
        values[chosen] = criterion.predict(outputs).cpu().numpy()
    return values, total / int((~np.isnan(examples.labels)).sum())


def outputs_of(model: PropertyModel, tokens: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
    """(rows, their outputs fp32 [B, O]) of each micro-batch of a ragged batch, longest first; without gradients."""
    device = next(model.head.parameters()).device

    def outputs(chosen: np.ndarray) -> tuple[np.ndarray, Tensor]:
        return chosen, model(unmasked_stream(*take_sequences(tokens, lengths, chosen), device)).float()

    yield from on_cores(outputs, length_batches(lengths, BATCH_TOKENS[device.type]), device)


def _evaluated(model: PropertyModel, examples: Examples) -> Iterator[tuple[np.ndarray, Tensor]]:
    """(rows, their outputs): by micro-batches, or of rows that the encoder has read already all at once."""
    if examples.features is None:
        yield from outputs_of(model, examples.tokens, examples.lengths)
    else:
        yield np.arange(len(examples)), _forward(model, examples, 0)


def _forward(model: PropertyModel, examples: Examples, seed: int) -> Tensor:
    """Outputs of the rows of one micro-batch, fp32 [B, O]."""
    device = next(model.head.parameters()).device
    if examples.features is None:
        return model(unmasked_stream(examples.tokens, examples.lengths, device, seed)).float()
    features = torch.from_numpy(examples.features).to(device)
    return model.head(features, torch.tensor([seed], device=device)).float()


def batches_of_epoch(count: int, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Rows of each batch of an epoch: all of them once, in an order that depends on `seed` and `epoch` alone, in
    batches that differ by a row at most and have about `size`."""
    order = np.argsort(hash_of(seed_from(seed, "finetune", epoch), np.arange(count)), kind="stable")
    return np.array_split(order, -(-count // size))


def steps_of_epoch(count: int, settings: TrainingSettings) -> int:
    """Optimizer steps of an epoch over `count` rows."""
    return -(-count // settings.batch)


def put_weights(model: PropertyModel, weights: dict[str, Tensor]) -> None:
    """Give the model these weights, by the names of `PropertyModel.weights`; it keeps those that are not given."""
    parameters = model.weights()
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


def _train_epoch(
    model: PropertyModel,
    optimizer: torch.optim.Optimizer,
    criterion: Criterion,
    train: Examples,
    weights: np.ndarray,
    settings: TrainingSettings,
    seed: int,
    epoch: int,
    watcher: Watcher | None,
) -> float:
    """Mean loss of a label over the epoch."""
    model.train()
    batches = batches_of_epoch(len(train), settings.batch, seed, epoch)
    losses = []
    for number, rows in enumerate(batches):
        step = (epoch - 1) * len(batches) + number
        rate = _rate(settings, len(train), step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        loss = _train_batch(model, criterion, train.take(rows), weights[rows], seed_from(seed, "dropout", step))
        if not math.isfinite(loss):
            raise RunStopped(f"the loss of epoch {epoch}, batch {number + 1} is {loss}. Choose a smaller --lr.")
        if settings.clip:
            torch.nn.utils.clip_grad_norm_(model.trainable().values(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss * weights[rows].sum())
        if watcher is not None:
            watcher.batch(epoch, len(batches), loss)
    return float(sum(losses) / weights.sum())


def _train_batch(model: PropertyModel, criterion: Criterion, batch: Examples, weights: np.ndarray, seed: int) -> float:
    """Gradient of the mean loss of the batch's labels, added up over its micro-batches; that loss."""
    device = next(model.head.parameters()).device
    norm, total = weights.sum(), 0.0
    all_tokens = int((batch.lengths + 2).sum())  # what the encoder has read already needs no micro-batches
    limit = BATCH_TOKENS[device.type] if batch.features is None else all_tokens
    for number, chosen in enumerate(length_batches(batch.lengths, limit)):
        part = batch.take(chosen)
        labels, factors = (torch.from_numpy(array).to(device) for array in (part.labels, weights[chosen]))
        loss = criterion.loss(_forward(model, part, seed_from(seed, number)), labels, factors) / norm
        loss.backward()
        total += float(loss.detach())
    return total


def _rate(settings: TrainingSettings, rows: int, step: int) -> float:
    """Learning rate of the step, from 0: up to `lr` in the first `warmup` of all steps, then in a line to 0."""
    steps = settings.epochs * steps_of_epoch(rows, settings)
    rising = settings.warmup * steps
    return settings.lr * min((step + 1) / (rising + 1), (steps - step) / max(1.0, steps - rising), 1.0)


def _optimizer(model: PropertyModel, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW with weight decay for matrices alone, and in each group the `factor` of its layer's rate."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.trainable().items():
        decay = settings.weight_decay if parameter.dim() > 1 else 0.0
        factor = settings.layer_decay ** _depth(name, len(model.body.blocks))
        groups.setdefault((decay, factor), []).append(parameter)
    own = [{"params": values, "weight_decay": decay, "factor": factor} for (decay, factor), values in groups.items()]
    return torch.optim.AdamW(own, lr=settings.lr, betas=BETAS, eps=EPS)


def _depth(name: str, layers: int) -> int:
    """How many layers lie above that of a parameter: 0 for the head and the last norm, layers + 1 for the embedding."""
    if name.startswith(HEAD) or name.startswith("norm."):
        return 0
    return layers - int(name.split(".")[1]) if name.startswith("blocks.") else layers + 1


def _better(metric: str, record: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an epoch is better than all earlier ones: by the metric, NaN being the worst, and where it is equal (in a
    small part ranks often are) by the loss."""
    sign = -1 if metric in ERRORS else 1

    def key(one: Mapping[str, Any]) -> tuple[float, float]:
        value = one["valid"][metric]
        return (-math.inf if math.isnan(value) else sign * value, -one["valid_loss"])

    return key(record) > max(map(key, history), default=(-math.inf, -math.inf))


def _tensors(model: PropertyModel, optimizer: torch.optim.Optimizer, progress: Progress) -> dict[str, Tensor]:
    tensors = {f"weights/{name}": value.detach() for name, value in model.trainable().items()}
    tensors |= {f"best/{name}": value for name, value in progress.best.items()}
    for name, parameter in model.trainable().items():
        tensors |= {f"{moment}/{name}": optimizer.state[parameter][moment] for moment in (*MOMENTS, "step")}
    return tensors


def _facts(progress: Progress) -> dict[str, Any]:
    return {"history": progress.history, "best_epoch": progress.best_epoch}


def _resumed(model: PropertyModel, optimizer: torch.optim.Optimizer, store: StateStore | None) -> Progress:
    """How far the state in `store` is, with the model and the optimizer set to it; the start if there is none."""
    state = None if store is None else store.load()
    if state is None:
        return Progress()
    tensors, facts = state
    kinds: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        kinds.setdefault(kind, {})[name] = value
    put_weights(model, kinds["weights"])
    for name, parameter in model.trainable().items():
        state_of = {moment: kinds[moment][name].to(parameter.device) for moment in MOMENTS}
        optimizer.state[parameter] = {"step": kinds["step"][name], **state_of}
    best = {name: value.to(next(iter(model.weights().values())).device) for name, value in kinds["best"].items()}
    return Progress(facts["history"], facts["best_epoch"], best)
