"""Runs side by side at equal steps and at equal seconds, with the budget each was trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exlm_dist.evaluation.history import History, Series, read_history

COLUMNS = ("run", "objective", "k", "budget", "steps", "seconds", "tokens/s")


@dataclass(frozen=True)
class Row:
    """One run of a comparison; nan: not logged. `nll`, of each masked token of held-out sequences by itself, and
    `joint`, of all of a sequence at once, are in nats per masked token.
    """

    run: str
    objective: str
    states: int
    budget: str
    steps: int
    seconds: float
    tokens_per_second: float
    nll_at_steps: float
    joint_at_steps: float
    accuracy_at_steps: float
    nll_at_seconds: float
    joint_at_seconds: float
    accuracy_at_seconds: float


@dataclass(frozen=True)
class Comparison:
    """Runs at `steps` optimizer steps and at `seconds` of training time: each the most that all of them reached."""

    rows: list[Row]
    steps: float
    seconds: float

    def cells(self) -> list[list[str]]:
        """Header and rows as text."""
        header = [
            *COLUMNS,
            f"nll @{_whole(self.steps)} steps",
            "joint nll",
            "accuracy",
            f"nll @{_whole(self.seconds)} s",
            "joint nll",
            "accuracy",
        ]
        return [
            header,
            *(
                [
                    row.run,
                    row.objective,
                    str(row.states),
                    row.budget,
                    str(row.steps),
                    _whole(row.seconds),
                    _whole(row.tokens_per_second),
                    _fixed(row.nll_at_steps),
                    _fixed(row.joint_at_steps),
                    _percent(row.accuracy_at_steps),
                    _fixed(row.nll_at_seconds),
                    _fixed(row.joint_at_seconds),
                    _percent(row.accuracy_at_seconds),
                ]
                for row in self.rows
            ),
        ]

    def markdown(self) -> str:
        """The table in Markdown."""
        header, *rows = self.cells()
        lines = [header, ["---" if column < 2 or column == 3 else "---:" for column in range(len(header))], *rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"

    def __str__(self) -> str:
        cells = self.cells()
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)


def compare(runs: Sequence[Path]) -> Comparison:
    """Compare run folders by the held-out curves in their event logs, interpolated linearly between evaluations.

    nll, joint nll and accuracy are per masked token at the same positions for all runs (docs/metric.md).
    CheckpointError for a folder that contains no run.
    """
    return compare_histories([read_history(run) for run in runs])


def compare_histories(histories: Sequence[History]) -> Comparison:
    """`compare` for runs that have been read already."""
    curves = [history.series("valid/nll") for history in histories]
    steps = min((curve.steps[-1] for curve in curves if len(curve)), default=math.nan)
    ends = [history.seconds(curve.steps[-1:])[0] for history, curve in zip(histories, curves) if len(curve)]
    seconds = min((end for end in ends if not math.isnan(end)), default=math.nan)
    return Comparison([_row(history, steps, seconds) for history in histories], steps, seconds)


def _row(history: History, steps: float, seconds: float) -> Row:
    nll, accuracy = history.series("valid/nll"), history.series("valid/accuracy")
    joint = _joint(history)
    speed = history.series("perf/tokens_per_second").values
    return Row(
        run=history.name,
        objective=history.config.model.objective,
        states=history.config.model.states,
        budget=history.budget,
        steps=history.last_step,
        seconds=float(history.seconds(np.array([history.last_step]))[0]),
        tokens_per_second=float(np.median(speed)) if len(speed) else math.nan,
        nll_at_steps=nll.at(steps, nll.steps),
        joint_at_steps=joint.at(steps, joint.steps),
        accuracy_at_steps=accuracy.at(steps, accuracy.steps),
        nll_at_seconds=nll.at(seconds, history.seconds(nll.steps)),
        joint_at_seconds=joint.at(seconds, history.seconds(joint.steps)),
        accuracy_at_seconds=accuracy.at(seconds, history.seconds(accuracy.steps)),
    )


def _joint(history: History) -> Series:
    """The joint nll, which is the nll for a plain model; empty for an ExLM that was trained before it was logged: then
    `joint_nll` was the name of what is `objective_nll` now.
    """
    if history.config.model.objective == "mlm":
        return history.series("valid/nll")
    return history.series("valid/joint_nll" if len(history.series("valid/objective_nll")) else "")


def _whole(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0f}"


def _fixed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2%}"
