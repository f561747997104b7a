"""How every figure looks: colours that the colour-blind can tell apart, light frames, PNG and SVG."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: E402

#: Okabe and Ito's palette without its yellow, which is too light for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
ACCENT = "#D55E00"
#: Its lightness follows the value for every kind of colour vision, and in greyscale.
COLOUR_MAP = "cividis"
MUTED = "#666666"
_SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "svg.hashsalt": "exlm",
    "lines.linewidth": 1.6,
    "axes.axisbelow": True,
}


@contextmanager
def figure(width: float, height: float, title: str, subtitle: str = "") -> Iterator[Figure]:
    """A figure of `width` x `height` inches in the house style, with a title and a grey line below it."""
    with matplotlib.rc_context(_SETTINGS):
        made = Figure(figsize=(width, height), layout="constrained")
        made.suptitle(title + ("\n" if subtitle else ""), x=0.01, ha="left", linespacing=1.6)
        if subtitle:
            made.text(0.01, 1 - 0.34 / height, subtitle, color=MUTED, fontsize=8.5, ha="left", va="top")
        yield made


def save(made: Figure, folder: Path, name: str) -> Path:
    """Write `name.png` and `name.svg` into `folder`; returns the path of the PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    with matplotlib.rc_context(_SETTINGS):
        made.savefig(path, dpi=144)
        # The SVG takes the layout found for the PNG: finding it is most of the time.
        made.set_layout_engine("none")
        made.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    return path


def colours() -> Iterator[str]:
    """The palette, in an endless cycle."""
    return cycle(COLOURS)


def label(axes: Axes, title: str, x: str, y: str, **options: Any) -> None:
    """Title and axis labels (with units), left-aligned."""
    axes.set_title(title, loc="left", **options)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def plain_log_ticks(axes: Axes) -> None:
    """Logarithmic y axis labelled 0.5, 1, 2, 10 instead of powers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def line_styles(axes: Axes, **meanings: str) -> None:
    """Legend that says what each line style (`solid="original"`) stands for."""
    handles = [
        Line2D([], [], color="black", linestyle=kind, linewidth=1.2, label=meaning)
        for kind, meaning in meanings.items()
    ]
    axes.legend(handles=handles, loc="best")


def empty(axes: Axes, message: str) -> None:
    """Say in the middle of the axes why they are empty."""
    axes.text(0.5, 0.5, message, ha="center", va="center", transform=axes.transAxes, color=MUTED)
    axes.set_xticks([])
    axes.set_yticks([])
