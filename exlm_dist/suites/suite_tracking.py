"""Results in MLflow: below the training run of a checkpoint a child run for each task, split and seed, and in the
training run itself the mean over the seeds at the step of the checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exlm_dist.suites.masked_cell import MASKED
from exlm_dist.suites.masked_tracking import record_masked
from exlm_dist.suites.out_folder import read_suite
from exlm_dist.suites.run_events import write_to_runs
from exlm_dist.suites.suite_table import SuiteTable, read_table
from exlm_dist.tracking import EventLog
from exlm_dist.utils.files import fingerprint_of


def record_results(out: Path) -> None:
    """Write all results of checkpoints that are in a run folder to the events of their runs, each once, and send them
    to MLflow where the settings of a run say so."""
    if read_suite(out)["suite"] == MASKED:
        record_masked(out)
        return
    table = read_table(out)

    def write(log: EventLog, run: str) -> None:
        _write_children(log, table, run)
        _write_means(log, table, run)

    write_to_runs(table.columns, write)


def _write_children(log: EventLog, table: SuiteTable, run: str) -> None:
    for result in table.results:
        if result["checkpoint"].get("run") == run:
            log.child_run(_name(result), result["checkpoint"]["step"], _values(result), _tags(result))


def _write_means(log: EventLog, table: SuiteTable, run: str) -> None:
    """In rising order of the steps: a value of an earlier step than one that is there already is not written."""
    means: dict[int, dict[str, float]] = defaultdict(dict)
    for column in table.columns:
        if column.checkpoint.get("run") != run:
            continue
        for (task, split, key), entry in table.entries.items():
            if key == column.key and entry.best.mean == entry.best.mean:
                probe = "_frozen" if column.frozen else ""
                name = f"{table.suite['suite']}/{task}_{split}{probe}_test_{entry.metric}"
                means[column.checkpoint["step"]][name] = entry.best.mean
    for step in sorted(means):
        log.metrics(step, means[step])


def _name(result: Mapping[str, Any]) -> str:
    """Of the child run. Its end differs where the data, the split or the settings do."""
    probe = "-frozen" if result["method"]["frozen"] else ""
    details = {name: result[name] for name in ("data_sha256", "split_hash", "settings")}
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
        **{name: result[name] for name in ("suite", "task", "split", "protocol", "seed", "best_epoch")},
        "grid": " ".join(f"{name}={value}" for name, value in result["grid"].items()),
        "frozen": str(result["method"]["frozen"]).lower(),
        "split.hash": result["split_hash"],
        "data.sha256": result["data_sha256"],
        "budget": origin["budget"] or "not labelled",
        **{name: origin[name] for name in ("objective", "states")},
        **{f"checkpoint.{name}": origin[name] for name in ("path", "step", "sha256")},
        **result["versions"],
    }
