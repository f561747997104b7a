"""Figures of the suite `masked`: quality by the ratio of masked tokens, reliability, entropies, repeated tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, PercentFormatter

from exlm_dist.analysis import style
from exlm_dist.evaluation.masked_measures import ENTROPY_BIN
from exlm_dist.suites.masked_suite import RATIOS, REPEATED
from exlm_dist.suites.masked_table import MaskedTable, Point
from exlm_dist.suites.suite_table import Column

#: Ratios that have a panel of their own, the nearest ones that there are; and the one that curves by steps are of.
PANELS, CURVE_RATIO = (0.15, 0.3, 0.5), 0.15
#: Bins of fewer predictions are not drawn: how many of them are right is chance.
_FEWEST = 5
#: Relative difference up to which fractions of hidden tokens are the same.
_SAME = 0.03
_PERCENT = PercentFormatter(1)


def masked_figures(table: MaskedTable, folder: Path) -> list[Path]:
    """All figures that there are results for; paths of the PNGs."""
    made = []
    if ratios := table.points_of(RATIOS):
        made += [_quality(table, ratios, folder), _reliability(table, folder), _entropies(table, folder)]
        made += [path for path in [_steps(table, folder)] if path is not None]
    if table.points_of(REPEATED):
        made.append(_repeated(table, folder))
    return made


def _quality(table: MaskedTable, points: Sequence[Point], folder: Path) -> Path:
    """Curves over the ratio: nll, accuracy, entropy and, of molecules, how many completions are readable."""
    first = table.suite["complete"]
    panels = [
        ("nll", "nats per masked token", {"nll": "-", "joint_nll": "--"}, "solid: each by itself, dashed: jointly"),
        ("Accuracy", "", {"accuracy": "-", "joint_accuracy": "--"}, f"dashed: best completions of the first {first}"),
        ("Entropy", "nats per masked token", {"entropy": "-", "state_entropy": "--"}, "dashed: mean of the states"),
        ("Calibration error", "", {"ece": "-", "joint_ece": "--"}, f"dashed: best completions of the first {first}"),
        ("All right", "", {"exact": "-", "exact_in_10": "--"}, "solid: best completion, dashed: among the 10 best"),
        ("Readable molecules", "", {"valid_best": "-", "valid_independent": ":", "valid_drawn": "--"},
         "solid: best, dotted: each by itself, dashed: drawn"),
    ]  # fmt: skip
    known = [panel for panel in panels if _has(table, RATIOS, panel[2])]
    across = min(3, len(known))
    down = math.ceil(len(known) / across)
    with style.figure(3.7 * across, 1.2 + 2.7 * down, "Masked tokens by the ratio masked", _subtitle(table)) as made:
        axes_of = made.subplots(down, across, squeeze=False).flat
        for axes, (title, unit, names, legend) in zip(axes_of, known):
            for colour, column in zip(style.colours(), table.shown):
                for name, line in names.items():
                    _curve(axes, table, points, column, name, colour, line)
            style.label(axes, f"{title}\n", "ratio of masked tokens", unit)
            axes.text(0, 1.02, legend, transform=axes.transAxes, color=style.MUTED, fontsize=7.5)
            axes.xaxis.set_major_formatter(_PERCENT)
            if not unit:
                axes.yaxis.set_major_formatter(_PERCENT)
        for axes in list(axes_of):
            axes.set_visible(False)
        made.axes[0].legend(loc="best")
        return style.save(made, folder, "quality_by_ratio")


def _curve(
    axes: Axes, table: MaskedTable, points: Sequence[Point], column: Column, name: str, colour: str, line: str
) -> None:
    entries = [(point, table.entries.get((point, column.key))) for point in points]
    scores = {point.ratio: score for point, one in entries if one is not None and (score := one.score(name))}
    if scores:
        axes.errorbar(
            list(scores),
            [score.mean for score in scores.values()],
            yerr=[0.0 if math.isnan(score.sd) else score.sd for score in scores.values()],
            fmt=f"o{line}",
            markersize=3,
            color=colour,
            capsize=2,
            label=column.label if line == "-" else None,
        )


def _reliability(table: MaskedTable, folder: Path) -> Path:
    """Accuracy by the probability that the model gives, of single tokens and of completions; panels of `PANELS`."""
    points = panel_points(table)
    rows = [("reliability", "ece", "tokens")]
    if _has(table, RATIOS, ["joint_ece"]):
        rows.append(("reliability_joint", "joint_ece", "best completions"))
    size = 3.3
    title = "Is the model right as often as it says?"
    subtitle = f"{_subtitle(table)}; bins of {_FEWEST} predictions or more"
    with style.figure(size * len(points) + 0.4, 1.0 + size * len(rows), title, subtitle) as made:
        grid = made.subplots(len(rows), len(points), squeeze=False)
        for panels, (name, error, what) in zip(grid, rows):
            for axes, point in zip(panels, points):
                axes.plot([0, 1], [0, 1], color=style.MUTED, linewidth=1, linestyle="dotted")
                for colour, column in zip(style.colours(), table.shown):
                    _diagram(axes, table, point, column, (name, error), colour)
                style.label(axes, f"{what}, {point.ratio:.0%} masked", "probability", "right")
                axes.xaxis.set_major_formatter(_PERCENT)
                axes.yaxis.set_major_formatter(_PERCENT)
                axes.set_xlim(0, 1)
                axes.set_ylim(0, 1.02)
                if axes.get_legend_handles_labels()[0]:
                    axes.legend(loc="lower right", fontsize=7)
        return style.save(made, folder, "calibration")


def _diagram(axes: Axes, table: MaskedTable, point: Point, column: Column, names: tuple[str, str], colour: str) -> None:
    """The bins of a checkpoint, dots as large as there are predictions in them."""
    name, error = names
    entry = table.entries.get((point, column.key))
    known = [] if entry is None else entry.reliability(name)
    bins = [one for one in known if one["count"] >= _FEWEST]
    if entry is None or not bins:
        return
    total = sum(one["count"] for one in known)
    x, y = ([one[what] for one in bins] for what in ("confidence", "accuracy"))
    score = entry.score(error)
    said = "" if score is None else f" (error {score.mean:.1%})"
    axes.plot(x, y, color=colour, linewidth=1.2, label=f"{column.label}{said}")
    axes.scatter(x, y, s=[4 + 90 * one["count"] / total for one in bins], color=colour, alpha=0.6, linewidths=0)


def _entropies(table: MaskedTable, folder: Path) -> Path:
    """How sure the predictions are: histograms of the entropy of each masked token's distribution."""
    points = panel_points(table)
    subtitle = f"{_subtitle(table)}; solid: where the token may lie is open, dashed: mean of the states it may lie at"
    with style.figure(3.7 * len(points) + 0.4, 3.6, "Entropy of single masked tokens", subtitle) as made:
        for axes, point in zip(made.subplots(1, len(points), squeeze=False)[0], points):
            for colour, column in zip(style.colours(), table.shown):
                entry = table.entries.get((point, column.key))
                if entry is None:
                    continue
                kinds = {"entropy": "-"} | ({"state_entropy": "--"} if column.checkpoint["states"] > 1 else {})
                for name, line in kinds.items():
                    counts = np.array(entry.histogram(name), float)
                    edges = ENTROPY_BIN * np.arange(len(counts) + 1)
                    mean = entry.score(name)
                    label = f"{column.label} (mean {mean.mean:.3f})" if mean is not None else column.label
                    axes.stairs(counts / counts.sum(), edges, color=colour, linestyle=line, label=label, linewidth=1.3)
            style.label(axes, f"{point.ratio:.0%} masked", "nats", "fraction of masked tokens")
            style.plain_log_ticks(axes)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
            axes.legend(loc="best", fontsize=7)
        return style.save(made, folder, "entropy")


def _steps(table: MaskedTable, folder: Path) -> Path | None:
    """nll by the step of the checkpoint, of runs of which several were evaluated; None if there is none."""
    runs: dict[str, list[Column]] = {}
    for column in table.columns:
        if column.run is not None:
            runs.setdefault(column.run, []).append(column)
    several = {run: columns for run, columns in runs.items() if len(columns) > 1}
    if not several:
        return None
    point = nearest(table.points_of(RATIOS), CURVE_RATIO)
    subtitle = f"{point.ratio:.0%} masked; solid: each by itself, dashed: jointly"
    with style.figure(6, 3.6, "nll by the step of the checkpoint", subtitle) as made:
        axes = made.subplots()
        for colour, (run, columns) in zip(style.colours(), several.items()):
            for name, line in {"nll": "-", "joint_nll": "--"}.items():
                entries = {one.checkpoint["step"]: table.entries.get((point, one.key)) for one in columns}
                scores = {step: one.score(name) for step, one in sorted(entries.items()) if one is not None}
                known = {step: score.mean for step, score in scores.items() if score is not None}
                label = Path(run).name if line == "-" else None
                axes.plot(list(known), list(known.values()), f"o{line}", color=colour, markersize=4, label=label)
        style.label(axes, "", "step", "nats per masked token")
        axes.legend(loc="best")
        return style.save(made, folder, "nll_by_step")


def _repeated(table: MaskedTable, folder: Path) -> Path:
    """Repeated tokens: on the left the tokens that are hidden stay, and more positions show a mask; on the right the
    masks stay, and more tokens are hidden. A dot for each model, lines through models that have the same."""
    scores = [
        (point, score)
        for (point, _), entry in table.entries.items()
        if point.task == REPEATED and (score := entry.score("hidden_nll")) is not None
    ]
    copies = sorted({point.copies for point, _ in scores})
    colour_of = dict(zip(copies, style.colours()))
    sizes = table.tasks[REPEATED]
    subtitle = (
        f"{sizes['sequences']} sequences ({table.suite['part']}); k copies of each token, masked with probability p"
    )
    with style.figure(9, 4, "Repeated tokens: which of the two effects of a mask costs more?", subtitle) as made:
        left, right = made.subplots(1, 2, sharey=True)
        masked, hidden = {}, {}
        for number, (point, score) in enumerate(scores):
            masked[number], hidden[number] = point.ratio, point.ratio**point.copies
            for axes, x in ((left, masked[number]), (right, hidden[number])):
                error = 0.0 if math.isnan(score.sd) else score.sd
                axes.errorbar(x, score.mean, yerr=error, fmt="o", color=colour_of[point.copies], capsize=2, zorder=3)
                axes.annotate(f"k={point.copies}", (x, score.mean), (6, -3), textcoords="offset points", fontsize=8)
        for axes, same, x in ((left, hidden, masked), (right, masked, hidden)):
            for group in _alike(same):
                numbers = sorted(group, key=lambda number: x[number])
                label = f"{same[group[0]]:.0%} {'hidden' if axes is left else 'masked'}"
                values = [scores[number][1].mean for number in numbers]
                axes.plot([x[number] for number in numbers], values, "--", color=style.MUTED, linewidth=1, label=label)
            axes.xaxis.set_major_formatter(_PERCENT)
            axes.margins(x=0.1, y=0.15)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="best")
        style.label(left, "Same tokens hidden, more masks", "positions masked (p)", "nll of hidden tokens, nats")
        style.label(right, "Same masks, more tokens hidden", "tokens hidden (p to the power of k)", "")
        return style.save(made, folder, "repeated")


def _alike(values: dict[int, float]) -> list[list[int]]:
    """The keys of nearly equal values, of each three or more; two are alike by chance."""
    groups: list[list[int]] = []
    for key in sorted(values, key=values.__getitem__):
        if groups and math.isclose(values[groups[-1][0]], values[key], rel_tol=_SAME):
            groups[-1].append(key)
        else:
            groups.append([key])
    return [group for group in groups if len(group) > 2]


def panel_points(table: MaskedTable) -> list[Point]:
    """Those nearest to `PANELS`, each once."""
    points = table.points_of(RATIOS)
    return sorted({nearest(points, ratio) for ratio in PANELS})


def nearest(points: Sequence[Point], ratio: float) -> Point:
    """The point whose ratio is the nearest."""
    return min(points, key=lambda point: abs(point.ratio - ratio))


def _has(table: MaskedTable, task: str, names: Sequence[str] | dict[str, str]) -> bool:
    return any(
        entry.score(name) is not None
        for (point, _), entry in table.entries.items()
        if point.task == task
        for name in names
    )


def _subtitle(table: MaskedTable) -> str:
    sizes = table.tasks[RATIOS]
    return f"{sizes['sequences']} sequences ({table.suite['part']}), the same masked tokens for all"
