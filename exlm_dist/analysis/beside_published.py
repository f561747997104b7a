"""The scores of an evaluation beside those that the paper publishes, with how much more pretraining stands behind the
latter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from exlm_dist.analysis.published import PUBLISHED, Published
from exlm_dist.evaluation.history import read_history
from exlm_dist.suites.suite import OFFICIAL
from exlm_dist.suites.suite_table import Column, Entry, SuiteTable
from exlm_dist.utils.errors import UserError


def published_of(table: SuiteTable, task: str) -> list[tuple[Published, float]]:
    """Published rows that have a score of the task, and that score."""
    rows = PUBLISHED.get(table.suite["suite"], ())
    return [(row, row.scores[task]) for row in rows if task in row.scores]


def tokens_seen(column: Column) -> float:
    """Tokens, before expansion, that a checkpoint was trained on; NaN where its run does not say."""
    if column.run is None:
        return math.nan
    try:
        series = read_history(Path(column.run)).series("progress/tokens")
    except UserError:
        return math.nan
    return series.at(column.checkpoint["step"], series.steps)


def beside_published(table: SuiteTable) -> list[str]:
    """A table of ours, the baselines and what is published, and the budgets; empty if nothing is published of the
    tasks."""
    rows = [row for row in table.rows if published_of(table, row[0])]
    published = PUBLISHED.get(table.suite["suite"], ())
    columns = [column for column in table.shown if column.kind == "checkpoint"]
    if not rows or not columns:
        return []
    labels = [*(column.label for column in columns), *table.baselines, *(one.label for one in published)]
    split_apart = "" if table.of.splits == (OFFICIAL,) else ", and on a split of their own"
    lines = [
        "Not a reproduction: the published figures are from much more pretraining, on other molecules or texts, of a "
        f"larger model{split_apart}. They say where the way leads, not what was reached here.\n",
        f"| task | split | metric | {' | '.join(labels)} |",
        f"| --- | --- | --- |{' ---: |' * len(labels)}",
    ]
    for task, split in rows:
        own = [_shown(table.entries.get((task, split, column.key))) for column in columns]
        own += [_shown(table.best_of((task, split), trees)) for trees in table.baselines.values()]
        own += [f"*{one.scores[task]:.3f}*" if task in one.scores else "-" for one in published]
        lines.append(f"| {task} | {split} | {table.metric(task)} | {' | '.join(own)} |")
    return [*lines, "", *_budgets(columns, published)]


def _budgets(columns: Sequence[Column], published: Sequence[Published]) -> list[str]:
    most = published[-1]
    lines = [f"- {most.label}: {most.budget}, {most.tokens:.2g} tokens."]
    for column in columns:
        seen = tokens_seen(column)
        ratio = "not logged" if math.isnan(seen) else f"{seen:.2g} tokens, 1/{most.tokens / seen:,.0f} of the paper's"
        lines.append(f"- {column.label}: {ratio}; budget {column.checkpoint['budget'] or 'not labelled'}.")
    return lines


def _shown(entry: Entry | None) -> str:
    if entry is None or math.isnan(entry.best.mean):
        return "-"
    within = "" if math.isnan(entry.best.sd) else f" \u00b1 {entry.best.sd:.3f}"
    return f"{entry.best.mean:.3f}{within}"
