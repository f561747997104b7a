"""The comparable metric of a saved checkpoint: nll and accuracy per masked token on held-out sequences."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from exlm_dist.checkpoint.reader import (
    TOKENIZER_FOLDER,
    find_checkpoint,
    read_config,
    reference,
    run_folder_of,
    step_of,
)
from exlm_dist.config import RunConfig
from exlm_dist.data.loader import eval_batches
from exlm_dist.data.recipe import Recipe
from exlm_dist.data.shards import ShardDataset
from exlm_dist.inference.loading import choose_device, load_model
from exlm_dist.model.build import LanguageModel
from exlm_dist.model.scoring import score
from exlm_dist.model.stream import Stream
from exlm_dist.tokenizers import Tokenizer, load_tokenizer
from exlm_dist.tracking import EVENTS, EventLog, redact, sync
from exlm_dist.utils.errors import ConfigError, DataError, UserError
from exlm_dist.utils.logs import get_logger

#: Seconds that `evaluate_checkpoint` gives MLflow to take its result; it stays in the run folder anyway.
TRACKING_PATIENCE = 30.0
logger = get_logger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Result for one checkpoint.

    `nll` (nats), `perplexity` and `accuracy` are per masked token and compare across objectives. `joint_nll` is -log P
    per target as the model is trained on: that of ExLM includes the anchors and sums over all paths, so it must not be
    compared with the cross-entropy of a plain masked language model. `invalid`: fraction of sequences without a finite
    likelihood.
    """

    run: str
    budget: str
    objective: str
    states: int
    checkpoint: str
    step: int
    split: str
    sequences: int
    mask_ratio: float
    nll: float
    accuracy: float
    perplexity: float
    count: int
    joint_nll: float
    invalid: float
    fingerprints: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    def metrics(self) -> dict[str, float]:
        """The numbers, under the names used in `events.jsonl` and MLflow."""
        return {
            f"{self.split}/{name}": float(getattr(self, name))
            for name in ("nll", "accuracy", "perplexity", "joint_nll", "invalid")
        }

    def __str__(self) -> str:
        kind = f"exlm, k={self.states}" if self.objective == "exlm" else "plain mlm"
        return "\n".join(
            [
                f"{self.run} ({kind}) step {self.step}, budget {self.budget or 'not labelled'}",
                f"  {self.split}: {self.sequences} sequences, {self.mask_ratio:.0%} masked, {self.count} masked tokens",
                f"  nll {self.nll:.4f} nats per masked token (perplexity {self.perplexity:.3f})",
                f"  accuracy {self.accuracy:.2%}",
                f"  joint -log P per target {self.joint_nll:.4f} (as trained; not comparable across objectives)",
                f"  sequences without a path: {self.invalid:.2%}",
            ]
        )


def evaluate_checkpoint(
    path: Path,
    *,
    data: Path | None = None,
    split: str = "valid",
    sequences: int | None = None,
    mask_ratio: float | None = None,
    device: str = "auto",
    record: bool = True,
) -> Evaluation:
    """Evaluate a checkpoint, or the newest whole one of a run folder, on the first `sequences` (all) of a split.

    The same positions are masked for every model and run. `data` defaults to what the run was trained on. With `record`
    the result also becomes a child run of the training in the event log and MLflow.

    Raises:
        CheckpointError: no whole checkpoint at `path`. DataError: the data is missing, damaged, or was prepared with
        another tokenizer. ConfigError: `mask_ratio` outside (0, 1).
    """
    folder = find_checkpoint(path)
    config = _with_ratio(read_config(folder), mask_ratio)
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    data = Path(data if data is not None else config.data.path)
    dataset = ShardDataset.open(data, split, max_bad_records=config.data.max_bad_records)
    check_tokenizer(tokenizer, folder, dataset, data)
    count = min(sequences or len(dataset), len(dataset))
    chosen = choose_device(device)
    model = load_model(folder, config, tokenizer).to(chosen)
    sums = _evaluate(model, config, dataset, tokenizer.vocab_size, count, chosen)
    result = Evaluation(
        run=config.name,
        budget=config.budget,
        objective=config.model.objective,
        states=config.model.states,
        checkpoint=str(folder),
        step=step_of(folder),
        split=split,
        sequences=count,
        mask_ratio=config.masking.eval_ratio,
        **sums,
        fingerprints={
            "tokenizer": tokenizer.fingerprint,
            "data": dataset.fingerprint,
            "model": reference(folder)["checkpoint.sha256"],
        },
    )
    if record:
        record_evaluation(result)
    return result


def check_tokenizer(tokenizer: Tokenizer, checkpoint: Path, dataset: ShardDataset, data: Path) -> None:
    """DataError, naming both, if the data was not prepared with the tokenizer of the checkpoint."""
    other = load_tokenizer(dataset.tokenizer_path)
    if other.fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{data} was prepared with another tokenizer ({_identity(other)}) than checkpoint {checkpoint} "
            f"({_identity(tokenizer)}). Prepare the data with --tokenizer {checkpoint / TOKENIZER_FOLDER}."
        )


def record_evaluation(result: Evaluation) -> None:
    """Log the result as a child run in the event log of its run, and try to send it to MLflow. Where that is not
    possible, a warning says so: the numbers are there already.

    Does nothing for a checkpoint outside a run folder.
    """
    try:
        _record(result)
    except (UserError, OSError) as error:
        logger.warning("the evaluation is not recorded with its run (%s)", redact(str(error)))


def _record(result: Evaluation) -> None:
    run_folder = run_folder_of(Path(result.checkpoint))
    if run_folder is None or not (run_folder / EVENTS).is_file():
        return
    log = EventLog(run_folder / EVENTS)
    name = f"evaluate-{result.split}-{result.sequences}-mask{result.mask_ratio:g}-{result.fingerprints['data'][:8]}"
    tags = {
        "split": result.split,
        "sequences": result.sequences,
        "mask_ratio": result.mask_ratio,
        "budget": result.budget or "not labelled",
        "objective": result.objective,
        "states": result.states,
        **reference(Path(result.checkpoint)),
        **{f"fingerprint.{key}": value for key, value in result.fingerprints.items()},
    }
    log.child_run(name, result.step, result.metrics(), tags)
    log.close()
    if read_config(run_folder).tracking.mlflow:
        sync(run_folder, timeout=TRACKING_PATIENCE)


def _evaluate(
    model: LanguageModel,
    config: RunConfig,
    dataset: ShardDataset,
    vocab_size: int,
    sequences: int,
    device: torch.device,
) -> dict[str, Any]:
    """The comparable metrics of `scoring.score`, and the joint likelihood from the same forward passes."""
    totals = {"nll": 0.0, "targets": 0, "invalid": 0}

    def add(_module: Any, _inputs: Any, stream: Stream) -> None:
        finite = torch.isfinite(stream.log_likelihood)
        totals["nll"] -= float(stream.log_likelihood[finite].double().sum())
        totals["targets"] += int(stream.num_targets[finite].sum())
        totals["invalid"] += int((~finite).sum())

    batches = eval_batches(
        dataset,
        replace(Recipe.for_evaluation(config, vocab_size), bucket=1),
        sequences=sequences,
        rank=0,
        world=1,
    )
    hook = model.register_forward_hook(add)
    try:
        comparable = score(model, batches, device)
    finally:
        hook.remove()
    nll = comparable.nll / comparable.count
    return {
        "nll": nll,
        "accuracy": comparable.correct / comparable.count,
        "perplexity": _exp(nll),
        "count": int(comparable.count),
        "joint_nll": totals["nll"] / totals["targets"] if totals["targets"] else math.nan,
        "invalid": totals["invalid"] / sequences,
    }


def _identity(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.domain}, {tokenizer.vocab_size} entries, fingerprint {tokenizer.fingerprint[:12]}"


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _with_ratio(config: RunConfig, mask_ratio: float | None) -> RunConfig:
    if mask_ratio is None:
        return config
    if not 0 < mask_ratio < 1:
        raise ConfigError(f"mask ratio {mask_ratio} must be above 0 and below 1.")
    return config.model_copy(update={"masking": config.masking.model_copy(update={"eval_ratio": mask_ratio})})
