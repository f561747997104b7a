"""The results of the suite `masked` as one table: checkpoints by what was masked, mean and sd over the seeds."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from exlm_dist.suites.cells import read_results
from exlm_dist.suites.masked_suite import TASK_NAMES
from exlm_dist.suites.out_folder import read_suite, read_tasks
from exlm_dist.suites.suite_table import Column, Score, find_columns, latest_columns, score_of


class Point(NamedTuple):
    """What was masked."""

    task: str
    copies: int
    ratio: float


@dataclass(frozen=True)
class MaskedEntry:
    """A checkpoint at a point: its results, one for each seed of the masks."""

    results: list[dict[str, Any]]

    def scores(self, result: dict[str, Any]) -> dict[str, float | None]:
        """The scores of one of the results."""
        (found,) = result["scores"].values()
        return found

    def score(self, name: str) -> Score | None:
        """Mean and sd of a score; None if this checkpoint or this evaluation does not have it."""
        values = [self.scores(result).get(name) for result in self.results]
        return None if any(value is None for value in values) else score_of(values)

    def histogram(self, name: str) -> list[int]:
        """Counts of a table of entropies, of all seeds."""
        own = [result["tables"][name] for result in self.results]
        return [sum(counts[i] for counts in own if i < len(counts)) for i in range(max(map(len, own)))]

    def reliability(self, name: str) -> list[dict[str, float]]:
        """The bins of a reliability table, of all seeds."""
        bins: dict[float, list[dict[str, float]]] = defaultdict(list)
        for result in self.results:
            for row in result["tables"][name]:
                bins[row["to"]].append(row)
        return [_merged(bins[limit]) for limit in sorted(bins)]


@dataclass(frozen=True)
class MaskedTable:
    """All that the folder of an evaluation knows. points: in rising order. differing: points at which not all
    checkpoints were asked for the same tokens."""

    folder: Path
    suite: dict[str, Any]
    tasks: dict[str, dict[str, Any]]
    points: list[Point]
    columns: list[Column]
    entries: dict[tuple[Point, str], MaskedEntry]
    results: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    differing: list[Point]

    @property
    def shown(self) -> list[Column]:
        """Those of `latest_columns`."""
        return latest_columns(self.columns)

    def points_of(self, task: str) -> list[Point]:
        """The points of a task."""
        return [point for point in self.points if point.task == task]


def point_of(result: dict[str, Any]) -> Point:
    """What was masked for a result."""
    return Point(result["task"], int(result["grid"].get("copies", 1)), float(result["grid"]["ratio"]))


def read_masked_table(out: Path) -> MaskedTable:
    """Read the folder of an evaluation. CheckpointError if a file in it is damaged."""
    results, failures = read_results(out)
    grouped: dict[tuple[Point, str], list[dict[str, Any]]] = defaultdict(list)
    masked: dict[tuple[Point, int], set[str]] = defaultdict(set)
    for result in sorted(results, key=lambda result: result["seed"]):
        grouped[point_of(result), result["method"]["key"]].append(result)
        masked[point_of(result), result["seed"]].add(result["positions"])
    points = sorted({point for point, _ in grouped}, key=lambda one: (TASK_NAMES.index(one.task), *one[1:]))
    differing = [point for (point, _), hashes in masked.items() if len(hashes) > 1]
    entries = {key: MaskedEntry(own) for key, own in grouped.items()}
    columns = find_columns(results)
    return MaskedTable(
        out, read_suite(out), read_tasks(out), points, columns, entries, results, failures, sorted(set(differing))
    )


def _merged(rows: list[dict[str, float]]) -> dict[str, float]:
    """A bin of several tables as one."""
    count = sum(row["count"] for row in rows)
    means = {name: sum(row["count"] * row[name] for row in rows) / count for name in ("confidence", "accuracy")}
    return {"above": rows[0]["above"], "to": rows[0]["to"], "count": count, **means}
