"""The comparable metric of a saved checkpoint: nll and accuracy per masked token on held-out sequences."""

from __future__ import annotations

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
from exlm_dist.data.opening import open_dataset
from exlm_dist.data.recipe import Dataset, Recipe
from exlm_dist.data.repeated import with_copies
from exlm_dist.data.shards import ShardDataset
from exlm_dist.evaluation.exact_completions import exact_completions
from exlm_dist.inference.fill import BATCH_LOGITS
from exlm_dist.inference.loading import choose_device, load_model
from exlm_dist.model.build import LanguageModel
from exlm_dist.model.scoring import score
from exlm_dist.tokenizers import Tokenizer, load_tokenizer
from exlm_dist.tracking import EVENTS, EventLog, redact, sync
from exlm_dist.utils.errors import ConfigError, DataError, UserError
from exlm_dist.utils.logs import get_logger

#: Seconds that `evaluate_checkpoint` gives MLflow to take its result; it stays in the run folder anyway.
TRACKING_PATIENCE = 30.0
logger = get_logger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Result for one checkpoint: `values` by the names of docs/evaluation.md.

    `sequences`, with `count` masked tokens; the most probable completion was searched for the first `completed` of
    them. The run's -log P per target (`objective_nll`) must not be compared across objectives, all else may.
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
    count: int
    completed: int
    values: dict[str, float]
    fingerprints: dict[str, str]

    @property
    def nll(self) -> float:
        """Nats per masked token, each by itself."""
        return self.values["nll"]

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    def metrics(self) -> dict[str, float]:
        """The numbers, under the names used in `events.jsonl` and MLflow."""
        return {f"{self.split}/{name}": value for name, value in self.values.items()}

    def __str__(self) -> str:
        kind = f"exlm, k={self.states}" if self.objective == "exlm" else "plain mlm"
        values = self.values
        exact = f", every one right in {values['exact']:.2%} of {self.completed} sequences" if self.completed else ""
        lines = [
            f"{self.run} ({kind}) step {self.step}, budget {self.budget or 'not labelled'}",
            f"  {self.split}: {self.sequences} sequences, {self.mask_ratio:.0%} masked, {self.count} masked tokens",
            f"  each by itself: nll {self.nll:.4f} nats per masked token (perplexity {values['perplexity']:.3f}), "
            f"accuracy {values['accuracy']:.2%}",
            f"  all of a sequence at once: nll {values['joint_nll']:.4f} nats per masked token "
            f"(coupling {round(values['coupling'], 4) + 0.0:+.4f}){exact}",
            f"  -log P per target {values['objective_nll']:.4f} (as trained; not comparable across objectives)",
            f"  sequences without a path: {values['invalid']:.2%}",
        ]
        return "\n".join(lines + self._alignment_lines())

    def _alignment_lines(self) -> list[str]:
        """How the masked tokens lie at the states, in words; nothing for the plain model."""
        found = {name.removeprefix("alignment_"): value for name, value in self.values.items() if "alignment" in name}
        if not found:
            return []
        return [
            f"  alignment: {found['states_used']:.2f} of {self.states} states used; spread of their tokens "
            f"{found['token_spread']:.3f}, of their hidden vectors {found['hidden_spread']:.3f} of that between masks",
            *(
                f"    {kind}: {found[f'{kind}_own']:.1%} at the own states, "
                f"entropy {found[f'{kind}_entropy']:.3f} nats per masked token"
                for kind in ("prior", "posterior")
            ),
        ]


def evaluate_checkpoint(
    path: Path,
    *,
    data: Path | None = None,
    split: str = "valid",
    sequences: int | None = None,
    mask_ratio: float | None = None,
    complete: int = 1000,
    device: str = "auto",
    record: bool = True,
) -> Evaluation:
    """Evaluate a checkpoint, or the newest whole one of a run folder, on the first `sequences` (all) of a split.

    The same positions are masked for every model and run. The most probable completion is searched for the first
    `complete` of the sequences. `data` defaults to what the run was trained on. With `record` the result also becomes a
    child run of the training in the event log and MLflow.

    Raises:
        CheckpointError: no whole checkpoint at `path`. DataError: the data is missing, damaged, or was prepared with
        another tokenizer. ConfigError: `mask_ratio` outside (0, 1), `sequences` or `complete` out of range.
    """
    folder = find_checkpoint(path)
    config = _with_ratio(read_config(folder), mask_ratio)
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    data = Path(data if data is not None else config.data.path)
    dataset = open_dataset(data, split, max_bad_records=config.data.max_bad_records)
    check_tokenizer(tokenizer, folder, dataset, data)
    count, completed = _sizes(len(dataset), sequences, complete)
    chosen = choose_device(device)
    model = load_model(folder, config, tokenizer).to(chosen)
    recipe = replace(Recipe.for_evaluation(config, tokenizer.vocab_size), bucket=1)
    sequenced = with_copies(dataset, config.masking.copies)
    values = score(model, eval_batches(sequenced, recipe, sequences=count, rank=0, world=1), chosen).means()
    if completed:
        values["exact"] = _exact(model, sequenced, recipe, completed, chosen)
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
        count=int(values.pop("tokens")),
        completed=completed,
        values=values,
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
    options = f"{result.split}-{result.sequences}-mask{result.mask_ratio:g}-exact{result.completed}"
    name = f"evaluate-{options}-{result.fingerprints['data'][:8]}"
    tags = {
        "split": result.split,
        "sequences": result.sequences,
        "mask_ratio": result.mask_ratio,
        "completed": result.completed,
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


def _sizes(most: int, sequences: int | None, complete: int) -> tuple[int, int]:
    """(sequences, completed) of a split of `most` sequences; ConfigError for numbers out of range."""
    if sequences is not None and sequences < 1:
        raise ConfigError(f"sequences = {sequences}: must be at least 1.")
    if complete < 0:
        raise ConfigError(f"complete = {complete}: must be at least 0.")
    count = most if sequences is None else min(sequences, most)
    return count, min(complete, count)


def _exact(model: LanguageModel, dataset: Dataset, recipe: Recipe, sequences: int, device: torch.device) -> float:
    """Fraction of the first `sequences` that `exact_completions` counts, in micro-batches whose distributions over the
    vocabulary fit in memory."""
    logits = recipe.longest(dataset.lengths[:sequences]) * recipe.vocab_size  # of a sequence, at most
    micro = max(1, min(recipe.micro, BATCH_LOGITS // logits))
    batches = eval_batches(dataset, replace(recipe, micro=micro), sequences=sequences, rank=0, world=1)
    return exact_completions(model, batches, device) / sequences


def _identity(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.domain}, {tokenizer.vocab_size} entries, fingerprint {tokenizer.fingerprint[:12]}"


def _with_ratio(config: RunConfig, mask_ratio: float | None) -> RunConfig:
    if mask_ratio is None:
        return config
    if not 0 < mask_ratio < 1:
        raise ConfigError(f"mask ratio {mask_ratio} must be above 0 and below 1.")
    return config.model_copy(update={"masking": config.masking.model_copy(update={"eval_ratio": mask_ratio})})
