"""Checkpoints of runs that differ in their seed alone, as one column: the spread that another pretraining brings."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from exlm_dist.suites.suite_table import Column, Entry, SuiteTable, score_of


def pooled_table(table: SuiteTable) -> SuiteTable | None:
    """The same table with one column for all checkpoints of equal recipe, step and kind of training; the results of its
    entries are the runs, each with its means over the seeds of the training. Columns without a pretraining stay, and
    checkpoints of single runs too. None if no two runs differ in their seed alone.
    """
    groups: dict[object, list[Column]] = defaultdict(list)
    for column in table.shown:
        recipe = column.checkpoint.get("recipe") if column.kind == "checkpoint" else None
        groups[column.key if recipe is None else (recipe, column.checkpoint["step"], column.training)].append(column)
    if all(len(columns) == 1 for columns in groups.values()):
        return None
    columns, entries = [], {}
    for own in groups.values():
        pool = own[0] if len(own) == 1 else replace(own[0], key=f"pool of {own[0].key}", label=_label(own))
        columns.append(pool)
        for row in table.rows:
            found = [entry for column in own if (entry := table.entries.get((*row, column.key))) is not None]
            if found:
                entries[(*row, pool.key)] = found[0] if len(own) == 1 else _pool(found, pool)
    return replace(table, columns=columns, entries=entries)


def _pool(entries: Sequence[Entry], pool: Column) -> Entry:
    """An entry whose results are the runs."""
    return replace(entries[0], method=pool.key, results=[_run_result(entry) for entry in entries])


def _run_result(entry: Entry) -> dict[str, Any]:
    """Means over the seeds of the training of one run. A metric that is undefined for one of them is so."""
    first = entry.results[0]
    scores = {
        part: {name: _mean([result["scores"][part][name] for result in entry.results]) for name in first["metrics"]}
        for part in first["scores"]
    }
    return {"scores": scores, "method": first["method"], "metrics": first["metrics"]}


def _mean(values: Sequence[float | None]) -> float | None:
    mean = score_of(values).mean
    return None if math.isnan(mean) else mean


def _label(columns: Sequence[Column]) -> str:
    """What the names of the runs have in common, and how many there are."""
    names = [column.label.partition("@")[0] for column in columns]
    common = os.path.commonprefix(names).rstrip("-_. ") or names[0]
    rest = columns[0].label.partition("@")[2]
    return f"{common} ({len(columns)} runs)@{rest}"
