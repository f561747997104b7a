"""Curves over training: quality, optimisation, speed, alignment. From event logs alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, PercentFormatter

from exlm_dist.analysis import style
from exlm_dist.analysis.compute import computed
from exlm_dist.evaluation.history import History, Series

#: Steps over which training curves are averaged, as a fraction of the run.
SMOOTHING = 0.02
#: Draws a run in its colour; `by`: what a step is shown as.
By = Callable[[History, np.ndarray], np.ndarray]
Draw = Callable[[Axes, History, str, By], None]


def _steps(_history: History, steps: np.ndarray) -> np.ndarray:
    return steps


def _seconds(history: History, steps: np.ndarray) -> np.ndarray:
    return history.seconds(steps)


def _tokens(history: History, steps: np.ndarray) -> np.ndarray:
    return history.progress("tokens", steps)


def _operations(history: History, steps: np.ndarray) -> np.ndarray:
    return computed(history, steps) / 1e12


def plot_quality(histories: Sequence[History], folder: Path) -> Path:
    """Training loss, held-out nll and held-out accuracy, by steps and (if logged) by seconds of training."""
    by = {"optimizer steps": _steps, "seconds of training (without evaluation and restarts)": _seconds}
    return _quality(histories, folder, "Quality over training", "quality", ["loss", "nll", "accuracy"], by)


def plot_quality_by_compute(histories: Sequence[History], folder: Path) -> Path:
    """Held-out nll and accuracy by the original tokens that were trained on and by the operations that it took."""
    by = {
        "tokens, before expansion": _tokens,
        "TFLOP (10\u00b9\u00b2 operations), by the shape of the model": _operations,
    }
    return _quality(
        histories, folder, "Quality by tokens and by compute", "quality_by_compute", ["nll", "accuracy"], by
    )


def _quality(
    histories: Sequence[History], folder: Path, title: str, name: str, shown: Sequence[str], by: dict[str, By]
) -> Path:
    """A row for each of what is `shown`, a column for each of `by`, with the label of its axis."""
    every: dict[str, tuple[str, str, Draw]] = {
        "loss": ("Training loss (each run's own objective)", "nats", lambda *rest: _trained(*rest, name="train/loss")),
        "nll": ("Held-out nll", "nats per masked token", lambda *rest: _held_out(*rest, name="valid/nll")),
        "accuracy": ("Held-out accuracy", "masked tokens", lambda *rest: _held_out(*rest, name="valid/accuracy")),
    }
    with style.figure(10, 3 * len(shown), title, _subtitle(histories)) as made:
        grid = made.subplots(len(shown), len(by), sharey="row", sharex="col")
        for panels, (heading, unit, draw) in zip(grid, [every[one] for one in shown]):
            for axes, one in zip(panels, by.values()):
                _each(axes, histories, draw, one)
                style.label(axes, heading, "", unit if axes is panels[0] else "")
        for axes, label in zip(grid[-1], by):
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.set_xlabel(label)
        _legend(grid[0, 0], histories)
        return style.save(made, folder, name)


def plot_optimisation(histories: Sequence[History], folder: Path) -> Path:
    """Learning rate and gradient norm by steps."""
    with style.figure(10, 3.6, "Optimisation", _subtitle(histories)) as made:
        left, right = made.subplots(1, 2)
        _each(
            left,
            histories,
            lambda axes, history, colour, _: _line(axes, history.series("train/lr"), colour),
        )
        _each(right, histories, lambda *rest: _trained(*rest, name="train/grad_norm"))
        style.label(left, "Learning rate", "optimizer steps", "rate")
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1e}" if value else "0"))
        style.label(right, "Gradient norm (before clipping)", "optimizer steps", "L2 norm")
        if _positive(histories, "train/grad_norm"):
            style.plain_log_ticks(right)
        _legend(left, histories)
        return style.save(made, folder, "optimisation")


def plot_throughput(histories: Sequence[History], folder: Path) -> Path:
    """Tokens per second before and after expansion; time of a step, and how much of it was spent waiting for data."""
    with style.figure(10, 3.9, "Throughput", _subtitle(histories)) as made:
        left, right = made.subplots(1, 2)
        _each(left, histories, _speed)
        style.label(left, "Tokens per second", "optimizer steps", "tokens/s")
        left.set_ylim(bottom=0)
        _each(right, histories, _times)
        style.label(right, "Time of a step", "optimizer steps", "seconds")
        right.set_ylim(bottom=0)
        style.line_styles(right, solid="whole step", dotted="waiting for data")
        _legend(left, histories, {"solid": "original tokens", "dashed": "after expansion"})
        return style.save(made, folder, "throughput")


def plot_alignment_over_training(histories: Sequence[History], folder: Path) -> Path | None:
    """Held-out entropy of prior and posterior, their probability of the own states, states used, and how much the
    tokens of a mask's states differ, by steps; None where no run has logged them, as plain models do not."""
    runs = [history for history in histories if len(history.series("valid/alignment_states_used"))]
    if not runs:
        return None
    panels = [
        ("Entropy over the states", "nats per masked token", {"prior_entropy": "--", "posterior_entropy": "-"}),
        ("Probability of the own k states", "fraction", {"prior_own": "--", "posterior_own": "-"}),
        ("States used of each mask", "effective number, k at most", {"states_used": "-"}),
        ("How much the tokens of a mask's states differ", "total variation", {"token_spread": "-"}),
    ]
    subtitle = f"masked tokens of held-out sequences; {_subtitle(runs)}"
    with style.figure(10, 6.4, "Alignment over training", subtitle) as made:
        grid = made.subplots(2, 2, sharex=True)
        for axes, (title, unit, lines) in zip(grid.flat, panels):
            _each(axes, histories, partial(_alignment, lines))
            style.label(axes, title, "optimizer steps" if axes in grid[1] else "", unit)
        entropy, own, used, spread = grid.flat
        own.set_ylim(-0.02, 1.02)
        own.yaxis.set_major_formatter(PercentFormatter(1))
        used.set_ylim(0.95, max(history.config.model.states for history in runs) + 0.05)
        for axes in (entropy, spread):
            axes.set_ylim(bottom=0)
        meanings = {"solid": "posterior, given the targets", "dashed": "prior, by the transitions"}
        _legend(entropy, histories, meanings, among=runs)
        return style.save(made, folder, "alignment_over_training")


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` points (fewer at the ends), without the values that are not finite."""
    if width < 2 or not len(values):
        return values
    finite = np.isfinite(values)
    window = np.ones(width)
    sums = np.convolve(np.where(finite, values, 0.0), window, mode="full")[width // 2 :][: len(values)]
    counts = np.convolve(finite.astype(float), window, mode="full")[width // 2 :][: len(values)]
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _each(axes: Axes, histories: Sequence[History], draw: Draw, by: By = _steps) -> None:
    for history, colour in zip(histories, style.colours()):
        draw(axes, history, colour, by)
    if not axes.lines:
        style.empty(axes, "not logged")


def _trained(axes: Axes, history: History, colour: str, by: By, *, name: str) -> None:
    series = history.series(name)
    if not len(series):
        return
    x = by(history, series.steps)
    axes.plot(x, series.values, color=colour, alpha=0.22, linewidth=0.8)
    axes.plot(x, smooth(series.values, max(1, round(SMOOTHING * len(series)))), color=colour)


def _held_out(axes: Axes, history: History, colour: str, by: By, *, name: str) -> None:
    series = history.series(name)
    if len(series):
        axes.plot(by(history, series.steps), series.values, color=colour, marker="o", markersize=3.5)


def _alignment(lines: dict[str, str], axes: Axes, history: History, colour: str, _: By) -> None:
    for name, kind in lines.items():
        _line(axes, history.series(f"valid/alignment_{name}"), colour, linestyle=kind, marker="o", markersize=3)


def _speed(axes: Axes, history: History, colour: str, _: By) -> None:
    _line(axes, history.series("perf/tokens_per_second"), colour)
    _line(axes, history.series("perf/expanded_tokens_per_second"), colour, linestyle="--", linewidth=1.1)


def _times(axes: Axes, history: History, colour: str, _: By) -> None:
    _line(axes, history.series("perf/step_seconds"), colour)
    _line(axes, history.series("perf/wait_seconds"), colour, linestyle=":")


def _line(axes: Axes, series: Series, colour: str, **options: Any) -> None:
    if len(series):
        axes.plot(series.steps, series.values, color=colour, **options)


def _legend(
    axes: Axes,
    histories: Sequence[History],
    line_styles: dict[str, str] | None = None,
    among: Sequence[History] | None = None,
) -> None:
    """One entry for each run (or those `among` them), whichever lines it has, and one for each line style."""
    for history, colour in zip(histories, style.colours()):
        if among is not None and not any(history is one for one in among):
            continue
        axes.plot([], [], color=colour, label=f"{history.name} ({history.kind})")
    for kind, meaning in (line_styles or {}).items():
        axes.plot([], [], color="black", linestyle=kind, linewidth=1.2, label=meaning)
    axes.legend(loc="best")


def _positive(histories: Sequence[History], name: str) -> bool:
    values = np.concatenate([history.series(name).values for history in histories])
    return bool(len(values)) and bool((values[np.isfinite(values)] > 0).all())


def _subtitle(histories: Sequence[History]) -> str:
    return "budget: " + ", ".join(sorted({history.budget for history in histories}))
