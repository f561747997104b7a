"""One cell computed: a checkpoint fine-tuned by the one routine that there is, a linear probe on its embeddings, or a
baseline."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from exlm_dist.finetuning.ensemble import train_members, with_features
from exlm_dist.finetuning.finetune_settings import METRICS, TrainingSettings
from exlm_dist.finetuning.metrics import evaluate_predictions
from exlm_dist.finetuning.model_folder import STATE_FOLDER, without_nan
from exlm_dist.finetuning.splits import Parts, split_hash
from exlm_dist.inference.loading import LoadedCheckpoint, load_checkpoint
from exlm_dist.model.build import build_model
from exlm_dist.suites.bag_of_words import predict_from_words
from exlm_dist.suites.catalogue import SUITES
from exlm_dist.suites.cells import Cell, claimed, publish_result, read_result
from exlm_dist.suites.chemprop import predict_from_chemprop
from exlm_dist.suites.embedded_tasks import EMBEDDINGS, Embedded, embedded
from exlm_dist.suites.fingerprints import fingerprint_features, predict_from_fingerprints
from exlm_dist.suites.linear_probe import predict_by_probe
from exlm_dist.suites.methods import RANDOM
from exlm_dist.suites.moleculenet import CHEMPROP
from exlm_dist.suites.task_data import EncodedTask, TaskData
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.version import VERSION, git_commit

#: Of the hidden states of a molecule, for linear probes.
POOLING = "mean"
#: What a result has of its computation, besides what it is of.
_COMPUTED = (
    *("scores", "best_epoch", "epochs", "settings", "strength", "truncated", "unknown", "device", "seconds"),
    "versions",
)


@dataclass(frozen=True)
class Order:
    """A cell to be computed. files: those of the task. split_hash: what the split of it must be."""

    out: Path
    suite: str
    protocol: str
    files: tuple[Path, ...]
    split_hash: str
    cell: Cell

    def compute(self, device: str, threads: int) -> bool:
        """See `run_cell`."""
        return run_cell(self, device, threads)


def settings_of(suite: str, protocol: str, cell: Cell) -> TrainingSettings:
    """How a cell is trained: by the protocol, as a probe by what differs in it, and by the grid. ConfigError for values
    out of range."""
    task = SUITES[suite].task(cell.task)
    probe = SUITES[suite].probe if cell.method.frozen else {}
    changed: dict[str, Any] = {**probe, **dict(cell.grid), "seeds": 1, "seed": cell.seed, "metric": task.metric}
    return replace(task.protocols[protocol], **changed).for_task(task.kind)


def run_cell(order: Order, device: str, threads: int) -> bool:
    """Compute a cell and publish its result; False if that was there already. A result on another split that consists
    of the same rows (where no molecule has stereocentres, both kinds of scaffolds give one) is taken as it is. Busy if
    another process is at it; errors of the data, the checkpoint and the training as they come."""
    path = order.cell.path(order.out)
    with claimed(path) as partial:
        if partial is None:
            return False
        started = time.monotonic()
        data, parts = _task(order.suite, order.cell.task, order.files, order.cell.split)
        if split_hash(parts) != order.split_hash:
            raise DataError(
                f"{order.files[0].parent}: a file of {order.cell.task} has changed since the evaluation began. "
                "Begin anew with another --out."
            )
        result = _same_rows(order, data)
        if result is None:
            method = order.cell.method
            own = _baseline if method.checkpoint is None else _probed if method.probe else _finetuned
            result = own(order, data, parts, partial, device, threads)
            result["seconds"] = round(time.monotonic() - started, 2)
        publish_result(path, without_nan({**_described(order, data), **result}))
        return True


def _same_rows(order: Order, data: TaskData) -> dict[str, Any] | None:
    """What a cell on another split has come to whose parts have the same rows of the same data. `same_rows_as` is its
    split; the seconds are those that it took."""
    for path in order.cell.twins(order.out):
        result = read_result(path)
        if (result["split_hash"], result["data_sha256"]) == (order.split_hash, data.sha256):
            return {"same_rows_as": result["split"], **{name: result[name] for name in result if name in _COMPUTED}}
    return None


def _finetuned(order: Order, data: TaskData, parts: Parts, partial: Path, device: str, threads: int) -> dict[str, Any]:
    """Scores of a fine-tuned model with the weights of its best epoch."""
    settings = settings_of(order.suite, order.protocol, order.cell)
    used = _weights(order.cell, device)
    loaded = _loaded(used)
    pooling = settings.pooling if settings.frozen and data.pooled else None
    encoded = _encoded(used, order.suite, order.cell.task, order.files, pooling)
    (partial / STATE_FOLDER).mkdir(exist_ok=True)
    criterion = data.criterion(encoded, parts, settings)
    (member,) = train_members(loaded, criterion, encoded.of_parts(parts), settings, partial, watched=False)
    return {
        "scores": member.scores,
        "best_epoch": member.best_epoch,
        "epochs": len(member.history),
        "settings": asdict(settings),
        "truncated": encoded.truncated,
        "unknown": encoded.unknown,
        "device": loaded.device.type,
    }


def _probed(order: Order, data: TaskData, parts: Parts, partial: Path, device: str, threads: int) -> dict[str, Any]:
    """Scores of a linear model on embeddings; it is trained at once, so there is nothing to keep in `partial`."""
    found, metric = _embedded(order, device), SUITES[order.suite].task(order.cell.task).metric
    predicted, strength = predict_by_probe(found.features, data.labels, data.targets, parts, metric)
    return {
        "scores": _scores(predicted, data, parts),
        "strength": strength,
        "truncated": found.truncated,
        "unknown": found.unknown,
    }


def embed_order(order: Order, device: str) -> int:
    """Embed the molecules of the task of a probe, if they are not; how many. Busy if another process is at it."""
    before = _embedding_path(order).exists()
    found = _embedded(order, device, wait=False)
    return 0 if before else len(found.features)


def _embedded(order: Order, device: str, *, wait: bool = True) -> Embedded:
    def compute() -> Embedded:
        encoded = _encoded(_weights(order.cell, device), order.suite, order.cell.task, order.files, POOLING)
        assert encoded.examples.features is not None
        return Embedded(encoded.examples.features, encoded.truncated, encoded.unknown)

    return embedded(_embedding_path(order), compute, wait=wait)


def _embedding_path(order: Order) -> Path:
    """All splits have the same; of initial weights each seed has its own."""
    cell = order.cell
    seed = f"seed-{cell.seed}" if cell.method.kind == RANDOM else ""
    return order.out / EMBEDDINGS / cell.method.key / seed / f"{cell.task}.npz"


def _baseline(order: Order, data: TaskData, parts: Parts, partial: Path, device: str, threads: int) -> dict[str, Any]:
    """Scores of a baseline; it is trained at once, so there is nothing to keep in `partial`, and on the CPU but for
    chemprop."""
    kind, seed = order.cell.method.kind, order.cell.seed
    if kind == CHEMPROP:
        settings, program = settings_of(order.suite, order.protocol, order.cell), order.cell.method.facts["program"]
        predicted = predict_from_chemprop(Path(program), data, parts, settings, partial, device=device, threads=threads)
        return {"scores": _scores(predicted, data, parts), "settings": {"epochs": settings.epochs}}
    predict = predict_from_fingerprints if SUITES[order.suite].domain == "smiles" else predict_from_words
    features = _features(order.suite, order.cell.task, order.files)
    predicted = predict(kind, features, data.labels, data.targets, parts, seed=seed, threads=threads)
    return {"scores": _scores(predicted, data, parts)}


def _scores(predicted: Mapping[str, np.ndarray], data: TaskData, parts: Parts) -> dict[str, dict[str, float]]:
    return {
        part: evaluate_predictions(values, data.labels[parts[part]], data.targets) for part, values in predicted.items()
    }


def _described(order: Order, data: TaskData) -> dict[str, Any]:
    task = SUITES[order.suite].task(order.cell.task)
    return {
        "suite": order.suite,
        **order.cell.described(),
        "protocol": order.protocol,
        "kind": task.kind,
        "metric": task.metric,
        "metrics": METRICS[task.kind],
        "data_sha256": data.sha256,
        "split_hash": order.split_hash,
        "versions": {"exlm_dist": VERSION, "git": git_commit()},
    }


class _Weights(NamedTuple):
    """What is fine-tuned: a checkpoint, or with a seed the initial weights of its shape."""

    checkpoint: Path
    device: str
    initial: int | None


def _weights(cell: Cell, device: str) -> _Weights:
    assert cell.method.checkpoint is not None
    return _Weights(cell.method.checkpoint, device, cell.seed if cell.method.kind == RANDOM else None)


# The cells of a task, and those of a method, come one after another: what they have in common stays in memory.
@functools.lru_cache(maxsize=3)  # its splits take turns
def _task(suite: str, task: str, files: tuple[Path, ...], split: str) -> tuple[TaskData, Parts]:
    data = _data(suite, task, files)
    return data, data.split(split)


@functools.lru_cache(maxsize=1)
def _data(suite: str, task: str, files: tuple[Path, ...]) -> TaskData:
    return SUITES[suite].task(task).read(files)


@functools.lru_cache(maxsize=2)  # `random` needs the checkpoint with its shape too
def _loaded(used: _Weights) -> LoadedCheckpoint:
    if used.initial is None:
        return load_checkpoint(used.checkpoint, device=used.device)
    loaded = _loaded(used._replace(initial=None))
    vocab_size, backend = loaded.tokenizer.vocab_size, loaded.config.kernels.backend
    model = build_model(loaded.config.model, vocab_size, seed=used.initial, kernel_backend=backend)
    return replace(loaded, model=model.to(loaded.device).eval())


@functools.lru_cache(maxsize=1)
def _encoded(used: _Weights, suite: str, task: str, files: tuple[Path, ...], pooling: str | None) -> EncodedTask:
    """All rows of a task as a checkpoint reads them, with `pooling` also what its encoder makes of each."""
    loaded = _loaded(used)
    encoded = _data(suite, task, files).encode(loaded.tokenizer, loaded.max_tokens)
    return encoded if pooling is None else replace(encoded, examples=with_features(loaded, encoded.examples, pooling))


@functools.lru_cache(maxsize=1)
def _features(suite: str, task: str, files: tuple[Path, ...]) -> Any:
    """What a baseline reads: of molecules fingerprints, of texts the texts, as their words are those of a part."""
    columns = list(_data(suite, task, files).columns.values())
    return fingerprint_features(columns[0]) if SUITES[suite].domain == "smiles" else columns
