"""Runs that differ from a reference run in a few settings, as bars: what each change costs, with what the paper says
of the same change beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from exlm_dist.analysis import style
from exlm_dist.analysis.published import ABLATION, ABLATION_BUDGET, ABLATION_TOKENS
from exlm_dist.config import RunConfig, config_difference
from exlm_dist.evaluation.compare import Comparison, compare_histories
from exlm_dist.evaluation.history import History
from exlm_dist.finetuning.finetune_settings import ERRORS
from exlm_dist.suites.suite import OFFICIAL
from exlm_dist.suites.suite_table import Column, SuiteTable

#: Settings in which runs of one arm may differ, and those that follow from a plain objective.
_NOT_OF_AN_ARM = ("name", "seed")
_OF_EXLM = ("states", "transitions", "jump_prior", "jump_width", "jump_floor", "transition_positions", "anchors")
#: More settings that differ than so many: the arm is called like its first run.
MOST_NAMED = 3
#: What the paper's full model has, of what its ablation changes.
_FULL = {"objective": "exlm", "states": 4, "transitions": "dense", "rotary": "2d", "anchors": True}
ACROSS = 3


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seeds alone. label: how they differ from the first arm. numbers: of its runs, among all
    that are compared."""

    label: str
    config: RunConfig
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Measure:
    """A panel. values: of each run, NaN if it has none; task: of GLUE, of which the paper may have a figure."""

    name: str
    unit: str
    values: list[float]
    task: str = ""


def find_arms(histories: Sequence[History]) -> list[Arm]:
    """The arms, that of the first run first; none unless there are two of them and more than two runs, as of a pair the
    table says it all."""
    found: list[tuple[RunConfig, list[int]]] = []
    for number, history in enumerate(histories):
        same = next((own for config, own in found if not _differences(config, history.config)), None)
        if same is None:
            found.append((history.config, [number]))
        else:
            same.append(number)
    if len(found) < 2 or len(histories) < 3:
        return []
    reference = found[0][0]
    return [Arm(_label(reference, config), config, tuple(numbers)) for config, numbers in found]


def ablation(histories: Sequence[History], tables: Sequence[SuiteTable], folder: Path) -> tuple[list[str], Path | None]:
    """(a table as lines of Markdown, the figure); nothing if the runs have no arms (see `find_arms`).

    Held-out nll and joint nll at the most steps that all runs reached, and the scores of the evaluations by tasks: mean
    and sd (n - 1) over the runs of an arm.
    """
    arms = find_arms(histories)
    if not arms:
        return [], None
    compared = compare_histories(histories)
    measures = [*_held_out(compared), *_downstream(histories, tables)]
    lines = [
        "Runs that differ in their seeds alone are one arm: mean \u00b1 sd (n - 1) over them. Arms are named by the "
        f"settings that differ from those of {histories[0].name}.\n",
        f"| arm | runs | {' | '.join(one.name for one in measures)} |",
        f"| --- | ---: |{' ---: |' * len(measures)}",
    ]
    for arm in arms:
        cells = [_text(*_mean_sd(measure, arm)) for measure in measures]
        lines.append(f"| {arm.label} | {len(arm.numbers)} | {' | '.join(cells)} |")
    figure = _plot(arms, measures, histories, compared, folder)
    if any(_published(arm, measure) for arm in arms for measure in measures):
        lines.append(
            f"\nHollow diamonds: the paper's ablation, {ABLATION_BUDGET}, {_ratio(histories)}. Not a reproduction."
        )
    return [*lines, ""], figure


def _held_out(compared: Comparison) -> list[Measure]:
    at = "" if math.isnan(compared.steps) else f" @{compared.steps:.0f} steps"
    columns: dict[str, list[float]] = {
        "nll": [row.nll_at_steps for row in compared.rows],
        "joint nll": [row.joint_at_steps for row in compared.rows],
    }
    return [Measure(f"{name}{at}", "nats per masked token", values) for name, values in columns.items()]


def _downstream(histories: Sequence[History], tables: Sequence[SuiteTable]) -> list[Measure]:
    """A measure for each task and split of each evaluation, of the newest checkpoint of each run: whole models if any
    was fine-tuned, else heads, else linear probes."""
    found = []
    for table in tables:
        columns = [_columns_of(table, history) for history in histories]
        training = min((one.training for own in columns for one in own), default="")
        newest = [
            max((one for one in own if one.training == training), key=lambda one: one.checkpoint["step"], default=None)
            for own in columns
        ]
        for task, split in table.rows:
            entries = [None if one is None else table.entries.get((task, split, one.key)) for one in newest]
            values = [math.nan if entry is None else entry.best.mean for entry in entries]
            metric = table.metric(task)
            name = " ".join(filter(None, (task, "" if split == OFFICIAL else split, metric, training)))
            better = "lower" if metric in ERRORS else "higher"
            if sum(not math.isnan(value) for value in values) > 1:
                found.append(Measure(name, f"{better} is better", values, task if table.of.name == "glue" else ""))
    return found


def _columns_of(table: SuiteTable, history: History) -> list[Column]:
    """Those of the checkpoints of a run."""
    return [one for one in table.columns if one.run is not None and Path(one.run).resolve() == history.folder.resolve()]


def _differences(first: RunConfig, second: RunConfig) -> dict[str, object]:
    """Settings of the second that differ from the first and say what is learned."""
    left_out = {f"model.{name}" for name in _OF_EXLM} if second.model.objective == "mlm" else set[str]()
    if second.model.objective != first.model.objective:
        left_out |= {"model.rotary"}  # with one state for each token both are the same
    found = {key: new for key, _, new in config_difference(first, second) if key not in _NOT_OF_AN_ARM}
    return {key: new for key, new in found.items() if key not in left_out}


def _label(reference: RunConfig, config: RunConfig) -> str:
    changes = _differences(reference, config)
    if not changes:
        return f"{reference.name} (reference)"
    if len(changes) > MOST_NAMED:
        return config.name
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in changes.items())


def _published(arm: Arm, measure: Measure) -> float | None:
    """What the paper says of the same change, None where it says nothing or the arm differs from its row otherwise."""
    model = arm.config.model.model_dump(mode="json")
    for row in ABLATION:
        wanted = {"objective": "mlm"} if row.settings.get("objective") == "mlm" else {**_FULL, **row.settings}
        if all(model[name] == value for name, value in wanted.items()):
            return row.scores.get(measure.task)
    return None


def _ratio(histories: Sequence[History]) -> str:
    seen = [float(one.progress("tokens", np.array([one.last_step]))[0]) for one in histories]
    most = max((value for value in seen if not math.isnan(value)), default=math.nan)
    return "" if math.isnan(most) else f"{ABLATION_TOKENS / most:,.0f} times the tokens of the longest run here"


def _mean_sd(measure: Measure, arm: Arm) -> tuple[float, float]:
    """Over the runs of an arm that have it; NaN where there is none, and of one no sd."""
    known = [value for number in arm.numbers if not math.isnan(value := measure.values[number])]
    return (float(np.mean(known)) if known else math.nan, float(np.std(known, ddof=1)) if len(known) > 1 else math.nan)


def _text(mean: float, sd: float) -> str:
    return "-" if math.isnan(mean) else f"{mean:.3f}" + ("" if math.isnan(sd) else f" \u00b1 {sd:.3f}")


def _plot(
    arms: Sequence[Arm], measures: Sequence[Measure], histories: Sequence[History], compared: Comparison, folder: Path
) -> Path:
    across, down = min(ACROSS, len(measures)), math.ceil(len(measures) / ACROSS)
    budgets = ", ".join(dict.fromkeys(history.budget for history in histories))
    subtitle = f"mean and sd over runs that differ in their seeds alone, points: runs; budget: {budgets}"
    height = 1.1 + down * (0.85 + 0.3 * len(arms))
    with style.figure(2.4 + 3.0 * across, height, "Ablation", subtitle) as made:
        panels = made.subplots(down, across, squeeze=False, sharey=True).flat
        for measure, axes in zip(measures, panels):
            _bars(axes, measure, arms)
        for axes in list(panels):
            axes.set_visible(False)
        return style.save(made, folder, "ablation")


def _bars(axes: Axes, measure: Measure, arms: Sequence[Arm]) -> None:
    for place, arm in enumerate(arms):
        mean, sd = _mean_sd(measure, arm)
        if not math.isnan(mean):
            own = [measure.values[number] for number in arm.numbers]
            error = None if math.isnan(sd) else sd
            colour = style.COLOURS[0] if arm.config.model.objective == "exlm" else style.COLOURS[2]
            axes.barh(place, mean, xerr=error, color=colour, alpha=0.55, height=0.7, capsize=2.5)
            axes.plot(own, [place] * len(own), ".", color="black", markersize=3)
            axes.annotate(_text(mean, sd), (0, place), (4, 0), textcoords="offset points", va="center", fontsize=7.5)
        if (published := _published(arm, measure)) is not None:
            axes.plot(published, place, marker="D", color=style.ACCENT, markerfacecolor="none", linestyle="none")
    axes.set_yticks(range(len(arms)), [arm.label for arm in arms], fontsize=8)
    axes.set_ylim(len(arms) - 0.4, -0.6)
    style.label(axes, measure.name, measure.unit, "", fontsize=9)
