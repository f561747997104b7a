"""The results in the folder of an evaluation as one table: mean and sd over seeds, at the best point of the grid."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.finetuning.finetune_settings import ERRORS
from exlm_dist.suites.catalogue import SUITES, UNSEEDED
from exlm_dist.suites.cells import read_results
from exlm_dist.suites.methods import RANDOM
from exlm_dist.suites.out_folder import read_suite, read_tasks
from exlm_dist.suites.suite import Suite

#: The kinds of methods in the order of columns: what knows no pretraining comes first.
BASELINE_KINDS = tuple(kind for suite in SUITES.values() for one in suite.baselines for kind in one.kinds)
ORDER = (*BASELINE_KINDS, RANDOM, "checkpoint")
CONFIDENCE = 0.95
#: Of a run with more checkpoints the table has the last one alone.
MOST_STEPS = 3


@dataclass(frozen=True)
class Score:
    """A metric over the seeds; sd: n - 1, NaN of one seed. NaN where it is undefined."""

    mean: float
    sd: float
    seeds: int
    median: float


@dataclass(frozen=True)
class Entry:
    """A task, split and method. results: those of each seed, at the point of the grid whose mean metric of the
    validation part is the best; points: how many there were; part: the one whose figures are shown."""

    task: str
    split: str
    method: str
    metric: str
    grid: dict[str, Any]
    points: int
    results: list[dict[str, Any]]
    part: str = "test"

    def score(self, metric: str, part: str) -> Score:
        """Mean and sd over the seeds of a metric of a part."""
        return score_of([result["scores"][part][metric] for result in self.results])

    @property
    def best(self) -> Score:
        """The metric of the task on the part that is shown."""
        return self.score(self.metric, self.part)

    @property
    def seeded(self) -> bool:
        """Whether the seed has a say in its results: a linear probe of a checkpoint has no randomness, nor has a
        linear model of words."""
        kind = self.results[0]["method"]["kind"]
        return kind not in UNSEEDED and ("strength" not in self.results[0] or kind == RANDOM)

    @property
    def truncated(self) -> int:
        """Rows of which the checkpoint does not see all."""
        return self.results[0].get("truncated", 0)


@dataclass(frozen=True)
class Column:
    """A method. label: unlike that of any other column. frozen, probe: see `Method`."""

    key: str
    label: str
    kind: str
    frozen: bool
    checkpoint: dict[str, Any]
    probe: bool = False

    @property
    def training(self) -> str:
        """What is trained: '' (all of it), 'frozen' (the head), 'linear' (a linear model on the embeddings)."""
        return "linear" if self.probe else "frozen" if self.frozen else ""

    @property
    def run(self) -> str | None:
        """The run folder of a checkpoint; None if it is in none."""
        return self.checkpoint.get("run")


@dataclass(frozen=True)
class SuiteTable:
    """All that the folder of an evaluation knows.

    Args:
        rows: (task, split), in the order of the suite. entries: by task, split and key of the method. tasks: what is
        recorded of each task. results: of all cells. failures: cells that have failed, with the reason.
    """

    folder: Path
    suite: dict[str, Any]
    tasks: dict[str, dict[str, Any]]
    rows: list[tuple[str, str]]
    columns: list[Column]
    entries: dict[tuple[str, str, str], Entry]
    results: list[dict[str, Any]]
    failures: list[dict[str, Any]]

    @property
    def shown(self) -> list[Column]:
        """Those of `latest_columns`."""
        return latest_columns(self.columns)

    @property
    def of(self) -> Suite:
        """The suite."""
        return SUITES[self.suite["suite"]]

    @property
    def baselines(self) -> dict[str, list[Column]]:
        """The columns of each baseline that there are results of, by what the best of them is called."""
        found = {one.best: [column for column in self.columns if column.kind in one.kinds] for one in self.of.baselines}
        return {name: columns for name, columns in found.items() if columns}

    def metric(self, task: str) -> str:
        """The metric that is shown of a task."""
        return self.of.task(task).metric

    def best_of(self, row: tuple[str, str], columns: Sequence[Column]) -> Entry | None:
        """Of a row the entry of these columns with the best metric on the part that is shown; None of none."""
        found = (self.entries.get((*row, column.key)) for column in columns)
        known = [entry for entry in found if entry is not None and not math.isnan(entry.best.mean)]
        sign = -1 if self.metric(row[0]) in ERRORS else 1
        return max(known, key=lambda entry: sign * entry.best.mean, default=None)


@dataclass(frozen=True)
class Difference:
    """How much better (above 0) one method is than another, ± half of its 95 % interval; NaN of one seed."""

    value: float
    half_width: float

    @property
    def verdict(self) -> str:
        """'better', 'worse', 'no difference' (0 is in the interval), or 'one seed', of which nothing can be said."""
        if math.isnan(self.value):
            return "undefined"
        if math.isnan(self.half_width):
            return "one seed"
        if abs(self.value) <= self.half_width:
            return "no difference"
        return "better" if self.value > 0 else "worse"


def read_table(out: Path) -> SuiteTable:
    """Read the folder of an evaluation. CheckpointError if a file in it is damaged."""
    suite = read_suite(out)
    results, failures = read_results(out)
    grouped: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        grouped[result["task"], result["split"], result["method"]["key"]].append(result)
    order = SUITES[suite["suite"]]
    entries = {key: _entry(key, own, order.part) for key, own in grouped.items()}
    seen = {(task, split) for task, split, _ in entries}
    rows = [(task.name, split) for split in order.splits for task in order.tasks if (task.name, split) in seen]
    return SuiteTable(out, suite, read_tasks(out), rows, find_columns(results), entries, results, failures)


def latest_columns(columns: Sequence[Column]) -> list[Column]:
    """The columns without the earlier checkpoints of runs with more than `MOST_STEPS`."""
    steps: dict[str, set[int]] = defaultdict(set)
    for column in columns:
        if column.run is not None:
            steps[column.run].add(column.checkpoint["step"])
    return [
        column
        for column in columns
        if column.run is None
        or len(steps[column.run]) <= MOST_STEPS
        or column.checkpoint["step"] == max(steps[column.run])
    ]


def difference(first: Entry, second: Entry) -> Difference:
    """Of their means on the part that is shown, with the sign that makes more better; its 95 % interval by Welch's t,
    as the sds of the two differ. What no seed has a say in has an sd of 0, unless that is so of both."""
    from scipy import stats

    sign = -1 if first.metric in ERRORS else 1
    value = sign * (first.best.mean - second.best.mean)
    seeded = [entry.best for entry in (first, second) if entry.seeded]
    parts = [score.sd**2 / score.seeds for score in seeded] or [math.nan]
    degrees = [score.seeds - 1 for score in seeded]
    if math.isnan(sum(parts)) or not sum(parts):
        return Difference(value, sum(parts))
    freedom = sum(parts) ** 2 / sum(part**2 / number for part, number in zip(parts, degrees))
    return Difference(value, float(stats.t.ppf(1 - (1 - CONFIDENCE) / 2, freedom)) * math.sqrt(sum(parts)))


def _entry(key: tuple[str, str, str], results: Sequence[dict[str, Any]], part: str) -> Entry:
    points: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in sorted(results, key=lambda result: result["seed"]):
        points[repr(result["grid"])].append(result)
    metric = results[0]["metric"]
    sign = -1 if metric in ERRORS else 1

    def on_valid(own: list[dict[str, Any]]) -> float:
        value = score_of([result["scores"]["valid"][metric] for result in own]).mean
        return -math.inf if math.isnan(value) else sign * value

    best = max(points.values(), key=on_valid)
    return Entry(*key, metric, best[0]["grid"], len(points), best, part)


def score_of(values: Sequence[float | None]) -> Score:
    """Mean and sd; NaN where one is None."""
    known = np.array([math.nan if value is None else value for value in values])
    return Score(
        float(known.mean()),
        float(known.std(ddof=1)) if len(known) > 1 else math.nan,
        len(known),
        float(np.median(known)),
    )


def find_columns(results: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The methods that there are results of, in the order in which they are shown."""
    found = {}
    for result in results:
        method = result["method"]
        found[method["key"]] = Column(
            method["key"],
            method["label"],
            method["kind"],
            method["frozen"],
            result["checkpoint"],
            method.get("probe", False),
        )
    labels = Counter(column.label for column in found.values())
    columns = [
        replace(one, label=f"{one.label} ({one.key})") if labels[one.label] > 1 else one for one in found.values()
    ]
    return sorted(
        columns,
        key=lambda one: (ORDER.index(one.kind), one.frozen, one.probe, one.checkpoint.get("step", 0), one.label),
    )
