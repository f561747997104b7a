"""Results in MLflow: below the training run of a checkpoint a child run for each task, split and seed, and in the
training run itself the mean over the seeds at the step of the checkpoint, which is a metric of the LoggedModel of the
checkpoint too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exlm_dist.checkpoint.reader import read_config
from exlm_dist.finetuning.finetune_settings import ERRORS
from exlm_dist.suites.masked_cell import MASKED
from exlm_dist.suites.masked_tracking import record_masked
from exlm_dist.suites.out_folder import read_suite
from exlm_dist.suites.run_events import write_to_runs
from exlm_dist.suites.suite_table import Column, SuiteTable, read_table
from exlm_dist.tracking import EventLog
from exlm_dist.utils.files import fingerprint_of
from exlm_dist.utils.logs import get_logger

logger = get_logger(__name__)


def record_results(out: Path, register: str | None = None) -> None:
    """Write all results of checkpoints that are in a run folder to the events of their runs, each once, and send them
    to MLflow where the settings of a run say so.

    register: name of the registered model of which the best checkpoint becomes a version, see `best_checkpoint`.
    """
    if read_suite(out)["suite"] == MASKED:
        record_masked(out)
        return
    table = read_table(out)
    best, why = (None, "") if register is None else best_checkpoint(table)
    if register is not None:
        print(f"{register}: {why}", flush=True)

    def write(log: EventLog, run: str) -> None:
        _write_children(log, table, run)
        _write_means(log, table, run)
        if register is not None and best is not None and best.run == run:
            log.register(best.checkpoint["step"], register, why, _tags_of_checkpoint(table, best))
            if not read_config(Path(run)).tracking.mlflow:
                logger.warning("%s does not track in MLflow; register its checkpoint with: exlm sync %s", run, run)

    write_to_runs(table.columns, write)


def _write_children(log: EventLog, table: SuiteTable, run: str) -> None:
    for result in table.results:
        if result["checkpoint"].get("run") == run:
            log.child_run(_name(result), result["checkpoint"]["step"], _values(result), _tags(result))


def best_checkpoint(table: SuiteTable) -> tuple[Column | None, str]:
    """(the column that is the best on the validation parts, why), None if there is no checkpoint of a run with all
    rows of the table.

    The test part has no say, so that its figures stay what they are. Metrics of several kinds cannot be averaged: of
    each row (task and split) the columns are ranked by its metric, and the least mean rank wins; at equal ranks the
    later step.
    """
    columns = [
        column
        for column in table.columns
        if column.run is not None and all((*row, column.key) in table.entries for row in table.rows)
    ]
    if not columns:
        return None, "nothing is registered: no checkpoint of a run folder has results of all tasks and splits"
    ranks: dict[str, float] = dict.fromkeys([column.key for column in columns], 0.0)
    for row in table.rows:
        sign = -1 if table.metric(row[0]) in ERRORS else 1
        values = [sign * table.entries[(*row, one.key)].score(table.metric(row[0]), "valid").mean for one in columns]
        for column, value in zip(columns, values):
            above = sum(other > value for other in values) if value == value else len(values)
            ranks[column.key] += above + 1
    best = min(columns, key=lambda column: (ranks[column.key], -column.checkpoint["step"]))
    mean = ranks[best.key] / len(table.rows)
    return best, (
        f"{best.label} has the best mean rank ({mean:.2f} of {len(columns)}) by the metrics of {len(table.rows)} tasks "
        f"and splits of {table.suite['suite']} on their validation parts"
    )


def _write_means(log: EventLog, table: SuiteTable, run: str) -> None:
    for column in table.columns:
        if column.run != run:
            continue
        training = f"_{column.training}" if column.training else ""
        means = {
            f"{table.suite['suite']}/{task}_{split}{training}_{part}_{entry.metric}": score.mean
            for (task, split, key), entry in table.entries.items()
            if key == column.key
            for part in entry.results[0]["scores"]
            if (score := entry.score(entry.metric, part)).mean == score.mean
        }
        log.checkpoint(column.checkpoint["step"], means, _tags_of_checkpoint(table, column))


def _tags_of_checkpoint(table: SuiteTable, column: Column) -> dict[str, Any]:
    """Where a checkpoint is, and by what it was judged."""
    suite, origin = table.suite["suite"], column.checkpoint
    hashes = {
        f"{suite}.split.{task}_{split}": recorded["splits"][split]["hash"][:12]
        for task, recorded in table.tasks.items()
        for split in recorded["splits"]
    }
    return {
        f"{suite}.protocol": table.suite["protocol"],
        f"{suite}.folder": str(table.folder.resolve()),
        **hashes,
        "budget": origin["budget"] or "not labelled",
        "objective": origin["objective"],
        **{f"checkpoint.{name}": origin[name] for name in ("path", "step", "sha256")},
        **table.results[0]["versions"],
    }


def _name(result: Mapping[str, Any]) -> str:
    """Of the child run. Its end differs where the data, the split or the settings do."""
    probe = "-linear" if result["method"].get("probe") else "-frozen" if result["method"]["frozen"] else ""
    details = {name: result.get(name) for name in ("data_sha256", "split_hash", "settings")}
    where = f"{result['suite']}-{result['task']}-{result['split']}{probe}"
    return f"{where}-seed{result['seed']}-{fingerprint_of(details)[:8]}"


def _values(result: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{result['suite']}/{part}_{name}": value
        for part, scores in result["scores"].items()
        for name, value in scores.items()
        if value is not None and name != "skipped"
    }


def _tags(result: Mapping[str, Any]) -> dict[str, Any]:
    """By which child runs are found."""
    origin = result["checkpoint"]
    return {
        "kind": "evaluation",
        **{name: result[name] for name in ("suite", "task", "split", "protocol", "seed")},
        **{name: result[name] for name in ("best_epoch", "strength") if name in result},
        "grid": " ".join(f"{name}={value}" for name, value in result["grid"].items()),
        "frozen": str(result["method"]["frozen"]).lower(),
        "split.hash": result["split_hash"],
        "data.sha256": result["data_sha256"],
        "budget": origin["budget"] or "not labelled",
        **{name: origin[name] for name in ("objective", "states")},
        **{f"checkpoint.{name}": origin[name] for name in ("path", "step", "sha256")},
        **result["versions"],
    }
