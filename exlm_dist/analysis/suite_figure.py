"""One figure for each split of an evaluation: all methods on each task, mean and sd over the seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from exlm_dist.analysis import style
from exlm_dist.analysis.beside_published import published_of
from exlm_dist.finetuning.finetune_settings import ERRORS
from exlm_dist.suites.methods import RANDOM
from exlm_dist.suites.suite_table import BASELINE_KINDS, Column, SuiteTable

ACROSS = 3


def plot_split(table: SuiteTable, split: str, folder: Path) -> Path:
    """A panel for each task: a dot for each method, and a line at the best one of the baselines."""
    tasks = [task for task, own in table.rows if own == split]
    across, down = min(ACROSS, len(tasks)), math.ceil(len(tasks) / ACROSS)
    height = 1.3 + down * (0.9 + 0.24 * len(_labels(table)))
    protocol = table.suite["protocol"]
    subtitle = f"{table.of.part} part, mean and sd over the seeds, protocol {protocol}"
    if table.baselines:
        subtitle += f"; dashed: the best without pretraining ({', '.join(table.baselines)})"
    if len(_labels(table)) > len(table.shown):
        subtitle += "; hollow diamonds: published, of a far larger budget"
    with style.figure(2.2 + 3.1 * across, height, f"{table.suite['suite']}, split {split}", subtitle) as made:
        panels = made.subplots(down, across, squeeze=False, sharey=True).flat
        for task, axes in zip(tasks, panels):
            _panel(axes, table, task, split)
        for axes in list(panels):
            axes.set_visible(False)
        return style.save(made, folder, f"split_{split}")


def plot_steps(table: SuiteTable, split: str, folder: Path) -> Path | None:
    """The metric of each task by the step of the checkpoint, for runs of which several were evaluated; None if there
    is none."""
    runs: dict[tuple[str, str], list[Column]] = defaultdict(list)
    for column in table.columns:
        if column.run is not None:
            runs[column.run, column.training].append(column)
    several = {key: columns for key, columns in runs.items() if len(columns) > 1}
    tasks = [task for task, own in table.rows if own == split]
    if not several or not tasks:
        return None
    across, down = min(ACROSS, len(tasks)), math.ceil(len(tasks) / ACROSS)
    subtitle = f"{table.of.part} part by the step of the checkpoint, mean and sd over the seeds"
    subtitle += "; dotted: the encoder not trained"
    with style.figure(3.6 * across + 0.6, 1.3 + 2.4 * down, f"{table.suite['suite']}, split {split}", subtitle) as made:
        panels = made.subplots(down, across, squeeze=False).flat
        for task, axes in zip(tasks, panels):
            for colour, ((run, training), columns) in zip(style.colours(), several.items()):
                _curve(axes, table, task, split, columns, colour, f"{Path(run).name} {training}".rstrip())
            style.label(axes, task, "step", table.metric(task))
            axes.legend(loc="best")
        for axes in list(panels):
            axes.set_visible(False)
        return style.save(made, folder, f"steps_{split}")


def _curve(
    axes: Axes, table: SuiteTable, task: str, split: str, columns: Sequence[Column], colour: str, label: str
) -> None:
    found = [(column, table.entries.get((task, split, column.key))) for column in columns]
    scores = {column.checkpoint["step"]: entry.best for column, entry in found if entry is not None}
    steps = sorted(scores)
    axes.errorbar(
        steps,
        [scores[step].mean for step in steps],
        yerr=[0.0 if math.isnan(scores[step].sd) else scores[step].sd for step in steps],
        fmt="o:" if columns[0].frozen else "o-",
        markersize=4,
        color=colour,
        capsize=2.5,
        label=label,
    )


def _panel(axes: Axes, table: SuiteTable, task: str, split: str) -> None:
    for place, column in enumerate(table.shown):
        entry = table.entries.get((task, split, column.key))
        if entry is None:
            continue
        score = entry.best
        axes.errorbar(
            score.mean,
            place,
            xerr=None if math.isnan(score.sd) else score.sd,
            fmt="o" if not column.frozen else "s",
            color=_colour(column),
            markerfacecolor="white" if column.frozen else None,
            capsize=2.5,
            elinewidth=1.2,
        )
    for place, (one, score) in enumerate(published_of(table, task), len(table.shown)):
        axes.plot(score, place, marker="D", color=_shade(one.objective), markerfacecolor="none", linestyle="none")
    best = table.best_of((task, split), [column for columns in table.baselines.values() for column in columns])
    if best is not None:
        axes.axvline(best.best.mean, color=style.MUTED, linestyle="dashed", linewidth=1)
    labels = _labels(table)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    metric = table.metric(task)
    style.label(axes, task, f"{metric} ({'lower' if metric in ERRORS else 'higher'} is better)", "")


def _colour(column: Column) -> str:
    if column.kind in BASELINE_KINDS:
        return style.MUTED
    if column.kind == RANDOM:
        return style.COLOURS[5]
    return _shade(column.checkpoint["objective"])


def _shade(objective: str) -> str:
    return style.COLOURS[0] if objective == "exlm" else style.COLOURS[2]


def _labels(table: SuiteTable) -> list[str]:
    """Of the rows of a panel: the methods, then what is published of any task."""
    published = {one.label: None for task, _ in table.rows for one, _ in published_of(table, task)}
    return [*(column.label for column in table.shown), *published]
