"""Figures of a fine-tuned model: its epochs, and its predictions of the part that it did not learn from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter

from exlm_dist.analysis import style
from exlm_dist.analysis.finetuning_results import FinetuningResults, TargetResults
from exlm_dist.finetuning.finetune_settings import ERRORS
from exlm_dist.finetuning.metrics import predicted_classes

#: A confusion matrix of more classes has no numbers in its cells, and of still more no name for every one.
NUMBERED_CLASSES, NAMED_CLASSES = 12, 40
#: More targets than this have no names.
NAMED_TARGETS = 45
LONGEST_NAME = 60
#: The spread of this many rows at least is compared with their errors, in at most this many groups.
ROWS_PER_GROUP, GROUPS = 10, 10


def plot_members(results: FinetuningResults, folder: Path) -> Path:
    """Losses, and the metric of the validation part, of each member by epochs; its best epoch is marked."""
    subtitle = f"{results.folder.name}; dots: the best epochs, whose weights are kept; {_origin(results)}"
    with style.figure(10, 3.9, "Fine-tuning by epochs", subtitle) as made:
        left, right = made.subplots(1, 2)
        seen: list[np.ndarray] = []
        for epochs, member, colour in zip(results.histories, results.record["members"], style.colours()):
            best, x = member["best_epoch"], [one["epoch"] for one in epochs]
            metric = _floats([one["valid"][results.metric] for one in epochs])
            loss = _floats([one["valid_loss"] for one in epochs])
            seen.append(metric)
            left.plot(x, _floats([one["train_loss"] for one in epochs]), ".:", color=colour)
            left.plot(x, loss, ".-", color=colour)
            right.plot(x, metric, ".-", color=colour, label=f"seed {member['seed']}: {best} of {len(x)}")
            for axes, values in ((left, loss), (right, metric)):
                axes.plot(best, values[x.index(best)], color=colour, marker="o", markersize=7)
        style.label(left, "Loss", "epoch", "loss per label")
        style.line_styles(left, solid="validation", dotted="training")
        style.label(right, f"Validation {results.metric}", "epoch", results.metric)
        for axes in (left, right):
            axes.set_xlim(0.7, max(map(len, results.histories)) + 0.3)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if np.isnan(np.concatenate(seen)).all():
            style.empty(right, "undefined in every epoch")
        elif len(results.histories) <= len(style.COLOURS):
            right.legend(loc="best")
        return style.save(made, folder, "epochs")


def plot_target(results: FinetuningResults, number: int, folder: Path) -> Path:
    """What the ensemble predicts of a target: ROC, precision and recall, and confusion matrix of two classes;
    confusion matrix of several; values predicted against values measured, residuals and, of several members, errors
    against spread."""
    one = results.parts[results.shown_part][number]
    members = len(results.histories)
    draw, panels, width, height = {
        "binary": (_binary, 3, 11.0, 4.0),
        "multiclass": (_multiclass, 1, *_matrix_size(one)),
        "regression": (_regression, 3 if members > 1 else 2, 11.0 if members > 1 else 8.0, 4.1),
    }[one.target.kind]
    subtitle = (
        f"{results.folder.name}: {results.shown_part} part, {_counted(one)}, mean of {members}; {_origin(results)}"
    )
    with style.figure(width, height, _cut(one.target.name), subtitle) as made:
        axes = np.atleast_1d(made.subplots(1, panels))
        if len(one.labels):
            draw(axes, one)
        else:
            for panel in axes:
                style.empty(panel, "no labels in this part")
        return style.save(made, folder, f"target_{number + 1}")


def plot_targets(results: FinetuningResults, folder: Path) -> Path:
    """The metric of each target, best first, or of many targets its distribution, and how it goes with the number of
    labels. Errors are replaced by R², as targets may differ in their units."""
    metric = "r2" if results.metric in ERRORS else results.metric
    shown = results.parts[results.shown_part]
    values = np.array([one.metrics[metric] for one in shown])
    defined = np.isfinite(values)
    mean = f"mean {values[defined].mean():.3f}" if defined.any() else "undefined"
    subtitle = (
        f"{results.folder.name}: {results.shown_part} part, {mean} over {defined.sum()} of {len(values)} targets on "
        f"which it is defined; {_origin(results)}"
    )
    named = len(values) <= NAMED_TARGETS
    height = max(3.6, 1.4 + 0.19 * len(values)) if named else 4.2
    with style.figure(10.5, height, f"{metric} of each target", subtitle) as made:
        left, right = made.subplots(1, 2)
        if named:
            _named_targets(left, results, metric)
            style.label(left, "Each target", metric, "")
        else:
            left.hist(values[defined], bins=30, color=style.COLOURS[0], alpha=0.7)
            style.label(left, "Distribution", metric, "targets")
        counts = np.array([_rarest(one) for one in shown])
        right.plot(counts, values, "o", color=style.COLOURS[0], alpha=0.6, markersize=4.5)
        right.set_xscale("symlog", linthresh=10)
        right.set_xlim(0.7 * counts.min() - 0.5, 1.4 * counts.max() + 1)
        right.xaxis.set_major_locator(FixedLocator([0, *(n * 10**power for power in range(6) for n in (1, 2, 5))]))
        right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        right.xaxis.minorticks_off()
        what = "labels" if results.task == "regression" else "labels of the rarest class"
        style.label(right, "By the number of labels", f"{what} in the {results.shown_part} part", metric)
        if metric == "roc_auc":
            for line in (left.axvline, right.axhline):
                line(0.5, color=style.MUTED, linestyle="dashed", linewidth=1)
        return style.save(made, folder, "targets")


def errors_by_spread(spread: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(root mean square spread, root mean square error) of groups of rows with similar spread, ascending: at most 10
    groups of at least 10 rows. They are equal where the spread tells the size of the error (error-based calibration,
    Levi et al., arXiv 1905.11659)."""
    groups = np.array_split(np.argsort(spread, kind="stable"), max(1, min(GROUPS, len(spread) // ROWS_PER_GROUP)))
    spreads, errors = ([np.sqrt(np.mean(values[rows] ** 2)) for rows in groups] for values in (spread, error))
    return np.array(spreads), np.array(errors)


def _named_targets(axes: Axes, results: FinetuningResults, metric: str) -> None:
    """A dot for each target and part."""
    parts = {part: np.array([one.metrics[metric] for one in own]) for part, own in results.parts.items()}
    order = np.argsort(np.nan_to_num(parts[results.shown_part], nan=-np.inf), kind="stable")
    for part, colour in (("valid", style.COLOURS[4]), ("test", style.COLOURS[0])):
        if part in parts:
            axes.plot(parts[part][order], np.arange(len(order)), "o", color=colour, markersize=5, label=part)
    axes.set_yticks(np.arange(len(order)), [_cut(results.targets[n].name, 38) for n in order], fontsize=7.5)
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)


def _binary(panels: Sequence[Axes], one: TargetResults) -> None:
    from sklearn import metrics

    roc, precision_recall, confusion = panels
    truth, scores = one.labels.astype(int), one.values[:, 0]
    _confusion(confusion, one)
    style.label(roc, f"ROC: area {_number(one, 'roc_auc')}", "false positive rate", "true positive rate")
    title = f"Precision-recall: average {_number(one, 'pr_auc')}"
    style.label(precision_recall, title, "recall", "precision")
    if len(np.unique(truth)) < 2:
        for axes in (roc, precision_recall):
            style.empty(axes, "undefined: all labels are of one class")
        return
    false, true, _ = metrics.roc_curve(truth, scores)
    precision, recall, _ = metrics.precision_recall_curve(truth, scores)
    roc.plot(false, true, color=style.COLOURS[0])
    roc.plot([0, 1], [0, 1], color=style.MUTED, linestyle="dashed", linewidth=1, label="chance")
    precision_recall.step(recall, precision, where="post", color=style.COLOURS[0])
    precision_recall.axhline(truth.mean(), color=style.MUTED, linestyle="dashed", linewidth=1, label="chance")
    for axes in (roc, precision_recall):
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.legend(loc="lower right" if axes is roc else "best")


def _multiclass(panels: Sequence[Axes], one: TargetResults) -> None:
    _confusion(panels[0], one)


def _regression(panels: Sequence[Axes], one: TargetResults) -> None:
    parity, residuals, *rest = panels
    predicted, several = one.values[:, 0], bool(rest)
    parity.errorbar(
        one.labels,
        predicted,
        yerr=one.spread if several else None,
        fmt="o",
        markersize=3.5,
        alpha=0.6,
        elinewidth=0.7,
        color=style.COLOURS[0],
        ecolor=style.COLOURS[4],
    )
    ends = [min(parity.get_xlim()[0], parity.get_ylim()[0]), max(parity.get_xlim()[1], parity.get_ylim()[1])]
    parity.plot(ends, ends, color=style.MUTED, linestyle="dashed", linewidth=1)
    parity.set(xlim=ends, ylim=ends, box_aspect=1)
    title = f"rmse {_number(one, 'rmse')}, mae {_number(one, 'mae')}, r2 {_number(one, 'r2')}"
    style.label(parity, title, "measured", "predicted ± spread" if several else "predicted")
    error = predicted - one.labels
    residuals.hist(error, bins=min(30, max(5, round(len(error) ** 0.5))), color=style.COLOURS[0], alpha=0.7)
    residuals.axvline(0, color=style.MUTED, linestyle="dashed", linewidth=1)
    residuals.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    style.label(residuals, f"Residuals: mean {error.mean():+.3g}", "predicted - measured", "rows")
    for axes in rest:
        _uncertainty(axes, one.spread, np.abs(error))


def _uncertainty(axes: Axes, spread: np.ndarray, error: np.ndarray) -> None:
    """Errors against the spread of the members, row by row and for groups of rows."""
    axes.plot(spread, error, "o", markersize=3, alpha=0.35, color=style.COLOURS[0], label="a row")
    if len(spread) >= 2 * ROWS_PER_GROUP:
        axes.plot(*errors_by_spread(spread, error), "o-", color=style.ACCENT, label="groups of rows (root mean square)")
    end = max(float(spread.max()), float(error.max())) or 1.0
    axes.plot([0, end], [0, end], color=style.MUTED, linestyle="dashed", linewidth=1, label="error = spread")
    axes.set_xlim(0, 1.05 * spread.max() or 1)
    axes.set_ylim(0, 1.35 * error.max() or 1)  # room for the legend
    axes.legend(loc="upper left", fontsize=7)
    title = f"{(error <= spread).mean():.0%} of errors within the spread"
    style.label(axes, title, "spread of the members", "absolute error")


def _confusion(axes: Axes, one: TargetResults) -> None:
    """Rows: true classes, columns: predicted ones. Colour: the fraction of the row; number: of rows of the table."""
    assert one.target.classes is not None
    size = len(one.target.classes)
    counts = np.zeros((size, size), int)
    np.add.at(counts, (one.labels.astype(int), predicted_classes(one.values)), 1)
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(fractions, cmap=style.COLOUR_MAP, vmin=0, vmax=1)
    axes.grid(visible=False)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.8, format=PercentFormatter(1))
    bar.set_label("of the true class", fontsize=8)
    names, shown = [_cut(label, 20) for label in one.target.classes], np.arange(0, size, -(-size // NAMED_CLASSES))
    upright = 90 if size > 2 and max(map(len, names)) > 4 else 0
    axes.set_xticks(shown, [names[n] for n in shown], rotation=upright, fontsize=8)
    axes.set_yticks(shown, [names[n] for n in shown], fontsize=8)
    if size <= NUMBERED_CLASSES:
        for (row, column), count in np.ndenumerate(counts):
            colour = "black" if fractions[row, column] > 0.55 else "white"
            axes.text(column, row, f"{count}", ha="center", va="center", color=colour)
    title = f"accuracy {_number(one, 'accuracy')}, mcc {_number(one, 'mcc')}"
    style.label(axes, title, "predicted class", "true class")


def _matrix_size(one: TargetResults) -> tuple[float, float]:
    """Inches of a figure whose matrix has room for the names of the classes."""
    side = min(10.0, 3.6 + 0.4 * one.values.shape[1])
    return max(7.0, side + 1), side


def _rarest(one: TargetResults) -> int:
    """How many labels there are; of classes, of the rarest."""
    if one.target.classes is None:
        return len(one.labels)
    return int(np.bincount(one.labels.astype(int), minlength=len(one.target.classes)).min())


def _counted(one: TargetResults) -> str:
    """How many labels there are, of two classes also of the second."""
    positive = ""
    if one.target.kind == "binary" and one.target.classes is not None:
        positive = f" ({int(one.labels.sum())} of class {_cut(one.target.classes[1], 20)})"
    return f"{len(one.labels)} labels{positive}"


def _origin(results: FinetuningResults) -> str:
    return f"split: {results.record['split']['kind']}, budget: {results.record['budget'] or 'not labelled'}"


def _number(one: TargetResults, metric: str) -> str:
    value = one.metrics[metric]
    return "undefined" if np.isnan(value) else f"{value:.3f}"


def _floats(values: Sequence[float | None]) -> np.ndarray:
    """None, by which JSON says NaN, as NaN."""
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _cut(name: str, longest: int = LONGEST_NAME) -> str:
    """A name as one line of bearable length, which matplotlib does not take for a formula."""
    words = " ".join(name.encode(errors="replace").decode().split())
    return (words if len(words) <= longest else f"{words[: longest - 1]}\u2026").replace("$", r"\$")
