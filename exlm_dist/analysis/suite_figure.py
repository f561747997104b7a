"""One figure for each split of an evaluation: all methods on each task, mean and sd over the seeds."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes

from exlm_dist.analysis import style
from exlm_dist.finetuning.finetune_settings import ERRORS
from exlm_dist.suites.methods import RANDOM
from exlm_dist.suites.suite_table import FINGERPRINT_KINDS, Column, SuiteTable, best_entry

ACROSS = 3


def plot_split(table: SuiteTable, split: str, folder: Path) -> Path:
    """A panel for each task: a dot for each method, and a line at the better one of the fingerprints."""
    tasks = [task for task, own in table.rows if own == split]
    across, down = min(ACROSS, len(tasks)), math.ceil(len(tasks) / ACROSS)
    height = 1.3 + down * (0.9 + 0.24 * len(table.columns))
    protocol = table.suite["protocol"]
    subtitle = f"test part, mean and sd over the seeds, protocol {protocol}; dashed: the better of the fingerprints"
    with style.figure(2.2 + 3.1 * across, height, f"{table.suite['suite']}, split {split}", subtitle) as made:
        panels = made.subplots(down, across, squeeze=False, sharey=True).flat
        for task, axes in zip(tasks, panels):
            _panel(axes, table, task, split)
        for axes in list(panels):
            axes.set_visible(False)
        return style.save(made, folder, f"split_{split}")


def _panel(axes: Axes, table: SuiteTable, task: str, split: str) -> None:
    for place, column in enumerate(table.columns):
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
    trees = [table.entries.get((task, split, one.key)) for one in table.columns if one.kind in FINGERPRINT_KINDS]
    best = best_entry([entry for entry in trees if entry is not None])
    if best is not None:
        axes.axvline(best.best.mean, color=style.MUTED, linestyle="dashed", linewidth=1)
    axes.set_yticks(range(len(table.columns)), [column.label for column in table.columns], fontsize=8)
    axes.set_ylim(len(table.columns) - 0.4, -0.6)
    metric = table.metric(task)
    style.label(axes, task, f"{metric} ({'lower' if metric in ERRORS else 'higher'} is better)", "")


def _colour(column: Column) -> str:
    if column.kind in FINGERPRINT_KINDS:
        return style.MUTED
    if column.kind == RANDOM:
        return style.COLOURS[5]
    return style.COLOURS[0] if column.checkpoint["objective"] == "exlm" else style.COLOURS[2]
