"""Figures of a fine-tuned model: its epochs, and its predictions of the part that it did not learn from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from exlm_dist.analysis import style
from exlm_dist.analysis.finetuning_results import FinetuningResults, TargetResults
from exlm_dist.finetuning.finetune_settings import ERRORS
from exlm_dist.finetuning.metrics import predicted_classes

#: A confusion matrix of more classes has no numbers in its cells.
NUMBERED_CLASSES = 12
#: More targets than this have no names at their bars.
NAMED_TARGETS = 60
LONGEST_NAME = 60


def plot_members(results: FinetuningResults, folder: Path) -> Path:
    """Losses, and the metric of the validation part, of each member by epochs; its best epoch is marked."""
    with style.figure(10, 3.9, "Fine-tuning by epochs", _subtitle(results)) as made:
        left, right = made.subplots(1, 2)
        for number, (epochs, colour) in enumerate(zip(results.histories, style.colours())):
            best = results.record["members"][number]["best_epoch"]
            x = [one["epoch"] for one in epochs]
            metric = _floats([one["valid"][results.metric] for one in epochs])
            loss = _floats([one["valid_loss"] for one in epochs])
            left.plot(x, _floats([one["train_loss"] for one in epochs]), color=colour, linestyle="dotted")
            left.plot(x, loss, color=colour)
            right.plot(x, metric, color=colour, label=f"seed {results.record['members'][number]['seed']}")
            for axes, values in ((left, loss), (right, metric)):
                axes.plot(best, values[x.index(best)], color=colour, marker="o", markersize=6)
        style.label(left, "Loss", "epoch", "loss per label")
        style.line_styles(left, solid="validation", dotted="training")
        style.label(right, f"Validation {results.metric}", "epoch (dot: the best one, whose weights are kept)", "")
        if len(results.histories) <= len(style.COLOURS):
            right.legend(loc="best")
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return style.save(made, folder, "epochs")


def plot_target(results: FinetuningResults, number: int, folder: Path) -> Path:
    """What the ensemble predicts of a target: ROC, precision and recall, and confusion matrix of two classes,
    confusion matrix of several, or values predicted against values measured."""
    one = results.parts[results.shown_part][number]
    draw, width = {"binary": (_binary, 12.0), "multiclass": (_multiclass, 6.0), "regression": (_parity, 6.0)}[
        one.target.kind
    ]
    height = 5.0 if one.target.kind == "binary" else 5.4
    members = len(results.histories)
    title = f"{_cut(one.target.name)}: {results.shown_part} part"
    subtitle = f"{len(one.labels)} labels, {'one model' if members == 1 else f'mean of {members} members'}"
    with style.figure(width, height, title, f"{subtitle}; {_subtitle(results)}") as made:
        panels = np.atleast_1d(made.subplots(1, 3 if one.target.kind == "binary" else 1))
        if len(one.labels):
            draw(panels, one)
        else:
            for axes in panels:
                style.empty(axes, "no labels in this part")
        return style.save(made, folder, f"target_{number + 1}")


def plot_targets(results: FinetuningResults, folder: Path) -> Path:
    """The metric of each target, best first, with its mean; targets on which it is undefined are counted."""
    found = [(one.metrics[results.metric], one.target.name) for one in results.parts[results.shown_part]]
    defined = sorted((pair for pair in found if not np.isnan(pair[0])), reverse=results.metric not in ERRORS)
    values = [value for value, _ in defined]
    title = f"{results.metric} of each target: {results.shown_part} part"
    lacking = len(found) - len(defined)
    undefined = f"; undefined on {lacking} of {len(found)} targets" if lacking else ""
    with style.figure(10, 4.6, title, _subtitle(results) + undefined) as made:
        axes = made.subplots()
        axes.bar(range(len(values)), values, width=0.8 if len(values) <= NAMED_TARGETS else 1.0, color=style.COLOURS[0])
        if values:
            mean = float(np.mean(values))
            axes.axhline(mean, color=style.ACCENT, linestyle="dashed", label=f"mean {mean:.3f}")
            axes.legend(loc="upper right", bbox_to_anchor=(1, 1.12))
        else:
            style.empty(axes, f"{results.metric} is undefined on every target")
        if len(values) <= NAMED_TARGETS:
            axes.set_xticks(range(len(values)), [_cut(name, 30) for _, name in defined], rotation=45, ha="right")
        if results.metric == "roc_auc":
            axes.axhline(0.5, color=style.MUTED, linewidth=0.8)
        axes.grid(axis="x", visible=False)
        style.label(axes, "", "" if len(values) <= NAMED_TARGETS else "targets, best first", results.metric)
        return style.save(made, folder, "targets")


def _binary(panels: Sequence[Axes], one: TargetResults) -> None:
    from sklearn import metrics

    roc, precision_recall, confusion = panels
    truth, scores = one.labels.astype(int), one.values[:, 0]
    _confusion(confusion, one)
    assert one.target.classes is not None
    positive, fraction = _cut(one.target.classes[1]), truth.mean()
    if len(np.unique(truth)) < 2:
        for axes in (roc, precision_recall):
            style.empty(axes, "undefined: all labels are of one class")
        return
    false, true, _ = metrics.roc_curve(truth, scores)
    precision, recall, _ = metrics.precision_recall_curve(truth, scores)
    roc.plot(false, true, color=style.COLOURS[0], label=f"area {one.metrics['roc_auc']:.3f}")
    roc.plot([0, 1], [0, 1], color=style.MUTED, linestyle="dashed", linewidth=1, label="chance")
    precision_recall.step(
        recall, precision, where="post", color=style.COLOURS[0], label=f"average precision {one.metrics['pr_auc']:.3f}"
    )
    precision_recall.axhline(
        fraction, color=style.MUTED, linestyle="dashed", linewidth=1, label=f"chance {fraction:.3f}"
    )
    style.label(roc, "ROC", "false positive rate", "true positive rate")
    style.label(precision_recall, f"Precision and recall of class {positive}", "recall", "precision")
    for axes in (roc, precision_recall):
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_aspect("equal")
        axes.legend(loc="lower right" if axes is roc else "lower left")


def _multiclass(panels: Sequence[Axes], one: TargetResults) -> None:
    _confusion(panels[0], one)


def _parity(panels: Sequence[Axes], one: TargetResults) -> None:
    (axes,) = panels
    bars = None if np.isnan(one.spread).all() else np.nan_to_num(one.spread)
    axes.errorbar(
        one.labels,
        one.values[:, 0],
        yerr=bars,
        fmt="o",
        markersize=3.5,
        alpha=0.6,
        elinewidth=0.7,
        color=style.COLOURS[0],
        ecolor=style.COLOURS[4],
    )
    ends = [min(one.labels.min(), one.values.min()), max(one.labels.max(), one.values.max())]
    axes.plot(ends, ends, color=style.MUTED, linestyle="dashed", linewidth=1)
    axes.set_aspect("equal")
    scores = ", ".join(f"{name} {one.metrics[name]:.3f}" for name in ("rmse", "mae", "r2"))
    beside = " \u00b1 sd over the members" if bars is not None else ""
    style.label(axes, scores, "measured", f"predicted{beside}")


def _confusion(axes: Axes, one: TargetResults) -> None:
    """Rows: true classes, columns: predicted ones. Colour: the fraction of the row; number: of rows of the table."""
    assert one.target.classes is not None
    counts = np.zeros((len(one.target.classes),) * 2, int)
    np.add.at(counts, (one.labels.astype(int), predicted_classes(one.values)), 1)
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(fractions, cmap=style.COLOUR_MAP, vmin=0, vmax=1)
    axes.grid(visible=False)
    names = [_cut(label, 12) for label in one.target.classes]
    axes.set_xticks(range(len(names)), names, rotation=45 if len(names) > 4 else 0)
    axes.set_yticks(range(len(names)), names)
    if len(names) <= NUMBERED_CLASSES:
        for (row, column), count in np.ndenumerate(counts):
            colour = "black" if fractions[row, column] > 0.5 else "white"
            axes.text(column, row, f"{count}", ha="center", va="center", color=colour)
    style.label(axes, "Confusion (colour: fraction of the row)", "predicted class", "true class")


def _subtitle(results: FinetuningResults) -> str:
    return f"split: {results.record['split']['kind']}, budget: {results.record['budget'] or 'not labelled'}"


def _floats(values: Sequence[float | None]) -> np.ndarray:
    """None, by which JSON says NaN, as NaN."""
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _cut(name: str, longest: int = LONGEST_NAME) -> str:
    """A name of bearable length, which matplotlib does not take for a formula."""
    return (name if len(name) <= longest else f"{name[: longest - 1]}\u2026").replace("$", r"\$")
