"""Results of the suite `masked` in MLflow: below the training run a child run for each point and seed, and in the
training run itself the mean over the seeds at the step of the checkpoint, which is a metric of the LoggedModel of the
checkpoint too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exlm_dist.suites.masked_cell import MASKED
from exlm_dist.suites.masked_table import MaskedTable, read_masked_table
from exlm_dist.suites.run_events import write_to_runs
from exlm_dist.suites.suite_table import Column
from exlm_dist.tracking import EventLog

#: Scores whose means become metrics of the training run and of the model.
CURVES = ("nll", "joint_nll", "accuracy", "entropy", "ece", "valid_best")


def record_masked(out: Path) -> None:
    """Write all results of checkpoints that are in a run folder to the events of their runs, each once."""
    table = read_masked_table(out)

    def write(log: EventLog, run: str) -> None:
        for result in table.results:
            if result["checkpoint"]["run"] == run:
                log.child_run(_name(result), result["checkpoint"]["step"], _values(result), _tags(result))
        for column in table.columns:
            if column.run == run:
                log.checkpoint(column.checkpoint["step"], _means(table, column), _tags_of_checkpoint(table, column))

    write_to_runs(table.columns, write)


def _means(table: MaskedTable, column: Column) -> dict[str, float]:
    """Of a checkpoint, by the names of the metrics; what is undefined is left out."""
    means = {}
    for point in table.points:
        entry = table.entries.get((point, column.key))
        where = f"{MASKED}/{point.task}_{point.ratio:g}" + (f"_x{point.copies}" if point.copies > 1 else "")
        for name in CURVES:
            score = None if entry is None else entry.score(name)
            if score is not None and score.mean == score.mean:
                means[f"{where}_{name}"] = score.mean
    return means


def _tags_of_checkpoint(table: MaskedTable, column: Column) -> dict[str, Any]:
    """Where a checkpoint is, and what it was asked for."""
    origin = column.checkpoint
    own = next(result for result in table.results if result["checkpoint"]["sha256"] == origin["sha256"])
    return {
        f"{MASKED}.folder": str(table.folder.resolve()),
        f"{MASKED}.split": own["split"],
        f"{MASKED}.data": own["data_sha256"][:12],
        f"{MASKED}.sequences": table.suite["sequences"],
        "budget": origin["budget"] or "not labelled",
        "objective": origin["objective"],
        **{f"checkpoint.{name}": origin[name] for name in ("path", "step", "sha256")},
        **own["versions"],
    }


def _name(result: Mapping[str, Any]) -> str:
    """Of the child run. Its end differs where the masked tokens do."""
    grid = "-".join(f"{name}{value:g}" for name, value in result["grid"].items())
    return f"{MASKED}-{result['task']}-{result['split']}-{grid}-seed{result['seed']}-{result['positions'][:8]}"


def _values(result: Mapping[str, Any]) -> dict[str, float]:
    (scores,) = result["scores"].values()
    return {f"{MASKED}/{name}": value for name, value in scores.items() if value is not None}


def _tags(result: Mapping[str, Any]) -> dict[str, Any]:
    """By which child runs are found."""
    origin = result["checkpoint"]
    return {
        "kind": "evaluation",
        **{name: result[name] for name in ("suite", "task", "split", "seed", "positions")},
        **result["grid"],
        "data.sha256": result["data_sha256"],
        "budget": origin["budget"] or "not labelled",
        **{name: origin[name] for name in ("objective", "states")},
        **{f"checkpoint.{name}": origin[name] for name in ("path", "step", "sha256")},
        **result["versions"],
    }
