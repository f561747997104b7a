"""Figures of the state graph: transition matrix, posterior alignment, and the graph itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from exlm_dist.analysis import style
from exlm_dist.analysis.inspection import Inspection

#: Lowest probability on the colour scale of the transitions.
FLOOR = 1e-3
#: Edges are drawn if a path takes them with at least this probability.
EDGE = 0.02


def plot_transitions(inspections: Sequence[Inspection], folder: Path, subtitle: str) -> Path:
    """Transition matrices as heat maps; lines separate the groups of k states of one expanded position."""
    with style.figure(4.6 * len(inspections) + 0.6, 5.2, "Transition probabilities between states", subtitle) as made:
        panels = made.subplots(1, len(inspections), squeeze=False)[0]
        for axes, one in zip(panels, inspections):
            seen = np.ma.masked_less_equal(one.transitions, 0)
            image = axes.imshow(
                seen, norm=LogNorm(FLOOR, 1), cmap=style.COLOUR_MAP, interpolation="nearest", aspect="equal"
            )
            _groups(axes, one, both=True)
            style.label(axes, _shortened(one.text), "to a state of target", "from a state of target", fontsize=9)
        made.colorbar(image, ax=panels, label="probability (white: not allowed)", shrink=0.75, extend="min")
        return style.save(made, folder, "transitions")


def plot_alignment(inspections: Sequence[Inspection], folder: Path, subtitle: str) -> Path:
    """Posterior probability that each target is emitted by each state, and the best path."""
    with style.figure(
        4.6 * len(inspections) + 0.6, 4.2, "Which state emits which target (posterior)", subtitle
    ) as made:
        panels = made.subplots(1, len(inspections), squeeze=False)[0]
        for axes, one in zip(panels, inspections):
            image = axes.imshow(
                one.posterior, norm=Normalize(0, 1), cmap=style.COLOUR_MAP, interpolation="nearest", aspect="auto"
            )
            _groups(axes, one, both=False)
            passed = np.flatnonzero(one.path >= 0)
            axes.plot(
                passed,
                one.path[passed],
                linestyle="none",
                marker="o",
                markersize=4,
                markerfacecolor="none",
                markeredgecolor=style.ACCENT,
            )
            axes.set_yticks(range(len(one.targets)), [_name(token) for token in one.targets])
            style.label(axes, _shortened(one.text), "states of the expanded position of", "target", fontsize=9)
        made.colorbar(image, ax=panels, label="probability", shrink=0.85)
        circle = Line2D(
            [],
            [],
            linestyle="none",
            marker="o",
            markerfacecolor="none",
            markeredgecolor=style.ACCENT,
            label="best path",
        )
        made.legend(handles=[circle], loc="upper right", frameon=False, fontsize=8)
        return style.save(made, folder, "alignment")


def plot_state_graph(one: Inspection, folder: Path, subtitle: str, name: str = "state_graph") -> Path:
    """States in columns of k with their most probable token, the edges that paths take most, and the best path."""
    columns = len(one.targets)
    with style.figure(
        max(7.0, 1.25 * columns + 1.6), 0.8 * one.states + 1.9, f"State graph of  {_shortened(one.text, 60)}", subtitle
    ) as made:
        axes = made.subplots()
        _edges(axes, one)
        _nodes(axes, one)
        axes.set_xlim(-0.6, columns - 0.4)
        axes.set_ylim(one.states - 0.3, -0.95)
        axes.axis("off")
        for column, (target, position) in enumerate(zip(one.targets, one.positions)):
            axes.text(column, -0.72, _name(target), ha="center", va="center", fontsize=12, fontweight="bold")
            axes.text(
                column,
                one.states - 0.42,
                _position(target, position),
                ha="center",
                va="center",
                fontsize=7.5,
                color=style.MUTED,
            )
        axes.text(-0.45, -0.72, "target", ha="right", va="center", fontsize=8, color=style.MUTED)
        _graph_legend(made, axes)
        return style.save(made, folder, name)


def edge_flow(one: Inspection) -> np.ndarray:
    """Probability by the transitions alone that a path goes from state v to u, [L, L]: visits of v times P(u | v)."""
    length = len(one.transitions)
    starts = 1 if one.targets[0] == "<s>" else one.states  # without anchors a path starts at any of the first k
    visits = np.zeros(length)
    visits[:starts] = 1 / starts
    for state in range(length):  # transitions only go forward, so earlier states are final
        visits[state + 1 :] += visits[state] * one.transitions[state, state + 1 :]
    return visits[:, None] * one.transitions


def _coordinates(one: Inspection, state: int) -> tuple[float, float]:
    return state // one.states, state % one.states


def _edges(axes: Axes, one: Inspection) -> None:
    flow = edge_flow(one)
    best = np.flatnonzero(one.path >= 0)
    on_path = set(zip(best[:-1], best[1:]))
    pairs = [pair for pair in zip(*np.nonzero(flow >= EDGE)) if pair not in on_path]
    for start, end in sorted(pairs, key=lambda pair: flow[pair]):
        _arrow(
            axes, one, start, end, "#555555", 0.4 + 3.0 * flow[start, end], min(0.85, 0.12 + 1.2 * flow[start, end]), 1
        )
    for start, end in on_path:
        _arrow(axes, one, start, end, style.ACCENT, 2.2, 1.0, 2)


def _arrow(
    axes: Axes, one: Inspection, start: int, end: int, colour: str, width: float, alpha: float, order: int
) -> None:
    (x0, y0), (x1, y1) = _coordinates(one, start), _coordinates(one, end)
    skips = x1 - x0 > 1 or x0 == x1 and abs(y1 - y0) > 1
    bend = 0.22 if skips else 0.0
    axes.add_patch(
        FancyArrowPatch(
            (x0, y0),
            (x1, y1),
            arrowstyle="-|>",
            mutation_scale=9,
            shrinkA=15,
            shrinkB=16,
            color=colour,
            linewidth=width,
            alpha=alpha,
            zorder=order,
            connectionstyle=f"arc3,rad={bend}",
        )
    )


def _nodes(axes: Axes, one: Inspection) -> None:
    palette = colormaps[style.COLOUR_MAP]
    for state, visited in enumerate(one.visits):
        x, y = _coordinates(one, state)
        on_path = one.path[state] >= 0
        axes.plot(
            x,
            y,
            marker="o",
            markersize=25,
            markerfacecolor=palette(float(np.clip(visited, 0, 1))),
            zorder=3,
            markeredgecolor=style.ACCENT if on_path else "#888888",
            markeredgewidth=2.2 if on_path else 0.8,
        )
        ink = "black" if visited > 0.55 else "white"
        for text, size, rise in ((_name(one.tokens[state]), 9, 3), (f"{one.token_probability[state]:.0%}", 6, -6)):
            axes.annotate(
                text,
                (x, y),
                (0, rise),
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=size,
                color=ink,
                zorder=4,
            )


def _graph_legend(made: Figure, axes: Axes) -> None:
    made.colorbar(
        ScalarMappable(Normalize(0, 1), style.COLOUR_MAP),
        ax=axes,
        label="visited, given the targets",
        shrink=0.6,
        aspect=15,
        pad=0.01,
    )
    made.legend(
        handles=[
            Line2D([], [], color=style.ACCENT, linewidth=2.2, label="best path for the targets"),
            Line2D(
                [],
                [],
                color="#555555",
                linewidth=1.5,
                alpha=0.6,
                label=f"paths by the transitions alone (from {EDGE:.0%})",
            ),
        ],
        loc="outside lower left",
        ncols=2,
        frameon=False,
        fontsize=8,
    )


def _groups(axes: Axes, one: Inspection, both: bool) -> None:
    """Lines between the groups of k states, each named by its target."""
    edges = np.arange(1, len(one.targets)) * one.states - 0.5
    middles = np.arange(len(one.targets)) * one.states + (one.states - 1) / 2
    axes.grid(False)
    names = [_name(token) for token in one.targets]
    for edge in edges:
        axes.axvline(edge, color="#999999", linewidth=0.6)
    axes.set_xticks(middles, names)
    if both:
        for edge in edges:
            axes.axhline(edge, color="#999999", linewidth=0.6)
        axes.set_yticks(middles, names)
    axes.tick_params(length=0)


def _name(token: str) -> str:
    """A token for a figure: short names of special ones, sentencepiece's word mark visible, long ones truncated."""
    short = {"<s>": "BOS", "</s>": "EOS", "<mask>": "\u25a1", "<unk>": "UNK"}.get(
        token, token.replace("\u2581", "\u02fd")
    )
    return (short if len(short) <= 9 else short[:8] + "\u2026").replace("$", r"\$")


def _position(target: str, position: int) -> str:
    return "" if target in ("<s>", "</s>") else f"position {position}"


def _shortened(text: str, longest: int = 46) -> str:
    return (text if len(text) <= longest else text[: longest - 1] + "\u2026").replace("$", r"\$")
