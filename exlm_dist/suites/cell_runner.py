"""One cell computed: a checkpoint fine-tuned by the one routine that there is, or trees on fingerprints."""

from __future__ import annotations

import functools
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from exlm_dist.finetuning.dataset import Examples
from exlm_dist.finetuning.ensemble import train_members, with_features
from exlm_dist.finetuning.finetune_settings import METRICS, TrainingSettings
from exlm_dist.finetuning.inputs import encode_inputs
from exlm_dist.finetuning.metrics import evaluate_predictions
from exlm_dist.finetuning.model_folder import STATE_FOLDER, without_nan
from exlm_dist.finetuning.splits import Parts, split_hash
from exlm_dist.finetuning.targets import with_scaling
from exlm_dist.inference.loading import LoadedCheckpoint, load_checkpoint
from exlm_dist.model.build import build_model
from exlm_dist.suites.catalogue import SUITES
from exlm_dist.suites.cells import Cell, claimed, publish_result
from exlm_dist.suites.fingerprints import fingerprint_features, predict_from_fingerprints
from exlm_dist.suites.methods import RANDOM
from exlm_dist.suites.task_data import TaskData, read_task, split_task
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.version import VERSION, git_commit


@dataclass(frozen=True)
class Order:
    """A cell to be computed. file: of the task's data. split_hash: what the split of it must be."""

    out: Path
    suite: str
    protocol: str
    file: Path
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
    """Compute a cell and publish its result; False if that was there already. Busy if another process is at it; errors
    of the data, the checkpoint and the training as they come."""
    path = order.cell.path(order.out)
    with claimed(path) as partial:
        if partial is None:
            return False
        started = time.monotonic()
        data, parts = _task(order.suite, order.cell.task, order.file, order.cell.split)
        if split_hash(parts) != order.split_hash:
            raise DataError(f"{order.file} has changed since the evaluation began. Begin anew with another --out.")
        own = _fingerprints if order.cell.method.checkpoint is None else _finetuned
        result = own(order, data, parts, partial, device, threads)
        result["seconds"] = round(time.monotonic() - started, 2)
        publish_result(path, without_nan({**_described(order, data), **result}))
        return True


def _finetuned(order: Order, data: TaskData, parts: Parts, partial: Path, device: str, threads: int) -> dict[str, Any]:
    """Scores of a fine-tuned model with the weights of its best epoch."""
    settings = settings_of(order.suite, order.protocol, order.cell)
    method = order.cell.method
    assert method.checkpoint is not None
    used = _Weights(method.checkpoint, device, settings.seed if method.kind == RANDOM else None)
    loaded = _loaded(used)
    pooling = settings.pooling if settings.frozen else None
    examples, truncated, unknown = _examples(used, order.suite, order.cell.task, order.file, pooling)
    targets = with_scaling(data.targets, data.labels[parts["train"]], settings.scale_targets)
    (partial / STATE_FOLDER).mkdir(exist_ok=True)
    own = {part: examples.take(rows) for part, rows in parts.items()}
    (member,) = train_members(loaded, targets, own, settings, partial, watched=False)
    return {
        "scores": member.scores,
        "best_epoch": member.best_epoch,
        "epochs": len(member.history),
        "settings": asdict(settings),
        "truncated": truncated,
        "unknown": unknown,
        "device": loaded.device.type,
    }


def _fingerprints(
    order: Order, data: TaskData, parts: Parts, partial: Path, device: str, threads: int
) -> dict[str, Any]:
    """Scores of trees; they are trained at once, so there is nothing to keep in `partial`, and on the CPU."""
    kind, seed = order.cell.method.kind, order.cell.seed
    features = _features(order.suite, order.cell.task, order.file)
    predicted = predict_from_fingerprints(kind, features, data.labels, data.targets, parts, seed=seed, threads=threads)
    scores = {
        part: evaluate_predictions(values, data.labels[parts[part]], data.targets) for part, values in predicted.items()
    }
    return {"scores": scores}


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


# The cells of a task, and those of a method, come one after another: what they have in common stays in memory.
@functools.lru_cache(maxsize=1)
def _task(suite: str, task: str, file: Path, split: str) -> tuple[TaskData, Parts]:
    data = _data(suite, task, file)
    return data, split_task(data, split)


@functools.lru_cache(maxsize=1)
def _data(suite: str, task: str, file: Path) -> TaskData:
    return read_task(SUITES[suite].task(task), file)


@functools.lru_cache(maxsize=2)  # `random` needs the checkpoint with its shape too
def _loaded(used: _Weights) -> LoadedCheckpoint:
    if used.initial is None:
        return load_checkpoint(used.checkpoint, device=used.device)
    loaded = _loaded(used._replace(initial=None))
    vocab_size, backend = loaded.tokenizer.vocab_size, loaded.config.kernels.backend
    model = build_model(loaded.config.model, vocab_size, seed=used.initial, kernel_backend=backend)
    return replace(loaded, model=model.to(loaded.device).eval())


@functools.lru_cache(maxsize=1)
def _examples(used: _Weights, suite: str, task: str, file: Path, pooling: str | None) -> tuple[Examples, int, int]:
    """(all rows of a task, for a frozen encoder with what it makes of them; how many are cut; how many have a token
    that the vocabulary lacks)."""
    loaded, data = _loaded(used), _data(suite, task, file)
    encoded = encode_inputs(loaded.tokenizer, [data.texts], max_tokens=loaded.max_tokens, truncate=True)
    if encoded.failures:
        row, reason = next(iter(encoded.failures.items()))
        raise DataError(
            f"{data.path}: row {data.rows[row]}: {reason} ({len(encoded.failures)} rows that other checkpoints can "
            "read). Evaluate this one in another --out, on a file without these rows."
        )
    examples = Examples(encoded.tokens, encoded.lengths, data.labels)
    if pooling is not None:
        examples = with_features(loaded, examples, pooling)
    return examples, encoded.truncated, encoded.unknown


@functools.lru_cache(maxsize=1)
def _features(suite: str, task: str, file: Path) -> np.ndarray:
    return fingerprint_features(_data(suite, task, file).texts)
