"""A fine-tuning in MLflow: one run, with a child run for each member."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exlm_dist.checkpoint.reader import read_config, run_folder_of
from exlm_dist.finetuning.model_folder import HISTORY_FILE, member_folder, read_finetuned
from exlm_dist.finetuning.targets import Target, task_of
from exlm_dist.tracking import EVENTS, EventLog, redact, sync
from exlm_dist.utils.errors import UserError
from exlm_dist.utils.logs import get_logger

#: Seconds that MLflow gets to take the results; they stay in the folder of the model anyway.
TRACKING_PATIENCE = 30.0
#: Names of metrics begin with this: `valid/accuracy` alone is that of pretraining, per masked token.
PREFIX = "finetuning"
FIGURES = "report"
logger = get_logger(__name__)


def record_finetuning(model: Path, *, send: bool = True) -> None:
    """Write settings, metrics, members and figures of a fine-tuned model to MODEL/events.jsonl and, with `send` and if
    the settings of the checkpoint say so (`tracking.mlflow`), send them to MLflow, to be shown below the run of the
    checkpoint where that is there; `exlm sync MODEL` sends what was not sent. A failure is a warning, as the model is
    whole already. CheckpointError if MODEL is no fine-tuned model."""
    record = read_finetuned(model)
    try:
        _write_events(model, record)
        if send and read_config(model).tracking.mlflow:
            sync(model, timeout=TRACKING_PATIENCE)
    except (UserError, OSError) as error:
        logger.warning("the fine-tuning is not recorded in MLflow (%s); the model is whole", redact(str(error)))


def _write_events(model: Path, record: Mapping[str, Any]) -> None:
    log = EventLog(model / EVENTS, parent=run_folder_of(Path(record["checkpoint"]["path"])))
    try:
        log.params(
            {
                **{f"{PREFIX}.{name}": value for name, value in record["settings"].items()},
                "inputs": ", ".join(record["inputs"]),
                "targets": ", ".join(target["name"] for target in record["targets"]),
            }
        )
        tags = _tags(record)
        log.tags({**tags, "mlflow.note.content": _note(model, record)})
        for number, member in enumerate(record["members"]):
            history = json.loads((member_folder(model, number) / HISTORY_FILE).read_text(encoding="utf-8"))
            log.child_run(
                f"member-{number}",
                member["best_epoch"],
                _named({"test": member["test"]} if "test" in member else {}),
                {**tags, "seed": member["seed"], "best_epoch": member["best_epoch"], "sha256": member["sha256"]},
                {epoch["epoch"]: _of_epoch(epoch) for epoch in history},
            )
        log.metrics(0, _summary(record))
        for path in sorted(path for path in (model / FIGURES).iterdir() if path.suffix in (".md", ".png")):
            log.artifact(path, FIGURES)
        log.status("FINISHED")
    finally:
        log.close()


def _tags(record: Mapping[str, Any]) -> dict[str, Any]:
    """By which the run and its children are found."""
    return {
        "kind": "fine-tuning",
        "task": task_of([Target.from_json(target) for target in record["targets"]]),
        "split": record["split"]["kind"],
        "split.hash": record["split"]["hash"],
        "budget": record["budget"] or "not labelled",
        **{f"checkpoint.{name}": value for name, value in record["checkpoint"].items()},
        **{name: record["versions"][name] for name in ("exlm_dist", "git") if name in record["versions"]},
    }


def _note(model: Path, record: Mapping[str, Any]) -> str:
    names = ", ".join(f"`{target['name']}`" for target in record["targets"][:10])
    more = f" and {len(record['targets']) - 10} more" if len(record["targets"]) > 10 else ""
    return (
        f"**Fine-tuning** for {names}{more} \u00b7 {len(record['members'])} members "
        f"\u00b7 {record['split']['kind']} split \u00b7 budget {record['budget'] or 'not labelled'}\n\n"
        f"checkpoint `{record['checkpoint']['path']}` \u00b7 model `{model.resolve()}`"
    )


def _of_epoch(epoch: Mapping[str, Any]) -> dict[str, float]:
    own = {f"{PREFIX}/{name}": epoch[name] for name in ("lr", "train_loss", "valid_loss", "seconds")}
    return {**_known(own), **_named({"valid": epoch["valid"]})}


def _summary(record: Mapping[str, Any]) -> dict[str, float]:
    """Mean and sd over the members, and of the ensemble, of each metric of each part."""
    values = {
        f"{PREFIX}/{part}_{name}_{kind}": value
        for part, metrics in record["metrics"].items()
        for name, numbers in metrics.items()
        for kind, value in (*numbers.items(), ("ensemble", record["ensemble"][part][name]))
        if name != "skipped"
    }
    return _known(values)


def _named(parts: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    """Metrics by the names they have in MLflow."""
    return _known(
        {
            f"{PREFIX}/{part}_{name}": value
            for part, own in parts.items()
            for name, value in own.items()
            if name != "skipped"
        }
    )


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    """Without those that are undefined, which are null in the files."""
    return {name: value for name, value in values.items() if value is not None}
