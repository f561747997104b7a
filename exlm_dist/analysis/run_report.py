"""`exlm report`: every figure of one or several runs, and a page that shows them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from exlm_dist.analysis.ablation import ablation
from exlm_dist.analysis.curves import (
    plot_alignment_over_training,
    plot_optimisation,
    plot_quality,
    plot_quality_by_compute,
    plot_throughput,
)
from exlm_dist.analysis.html_page import write_page
from exlm_dist.analysis.inspection import inspect_checkpoint
from exlm_dist.analysis.lengths import plot_lengths, training_lengths
from exlm_dist.analysis.molecule_examples import plot_molecules
from exlm_dist.analysis.state_graph import plot_alignment, plot_state_graph, plot_transitions
from exlm_dist.analysis.suite_sections import judged_by_suites, suite_tables
from exlm_dist.checkpoint.reader import newest_checkpoint
from exlm_dist.config import config_difference
from exlm_dist.evaluation.compare import compare_histories
from exlm_dist.evaluation.history import History, read_history
from exlm_dist.inference.loading import load_checkpoint
from exlm_dist.tracking import CHANGES, EVENTS, EventLog, read_events, sync
from exlm_dist.utils.errors import UserError
from exlm_dist.utils.logs import get_logger

PLOTS = "plots"
REPORT = "report.md"
#: Seconds that `run_report` gives MLflow to take the figures; they stay in the run folder anyway.
TRACKING_PATIENCE = 30.0
logger = get_logger(__name__)


def run_report(runs: Sequence[Path], *, record: bool = True) -> Path:
    """Write figures to `plots/` and the page `report.md`, and the same as `report.html`, into the folder of the first
    run; returns the path of the page.

    Curves come from the event logs alone; lengths need the prepared data, the state graph the data and a whole
    checkpoint of the first ExLM run: the page says what could not be drawn. With `record` the page and the figures also
    become artifacts of the first run. CheckpointError if a folder contains no run.
    """
    histories = [read_history(run) for run in runs]
    home = Path(runs[0])
    folder = home / PLOTS
    table = compare_histories(histories)
    print(table, flush=True)
    plots = (plot_quality, plot_quality_by_compute, plot_optimisation, plot_throughput, plot_alignment_over_training)
    curves = [path for plot in plots if (path := plot(histories, folder)) is not None]
    judged = suite_tables(histories)
    ablated, bars = ablation(histories, judged, folder)
    figures, missing = _model_figures(histories, folder)
    drawn = [*([] if bars is None else [bars]), *curves, *figures]
    page = _page(histories, table.markdown(), ablated, drawn, missing)
    write_page(home / REPORT, "\n".join([page, *judged_by_suites(judged, home), _evaluations(histories)]))
    if record:
        _record(home, drawn)
    return home / REPORT


def _model_figures(histories: Sequence[History], folder: Path) -> tuple[list[Path], list[str]]:
    """Figures that need more than the event log, and why any could not be drawn."""
    history = next((one for one in histories if one.config.model.objective == "exlm"), histories[0])
    figures: list[Path] = []
    missing: list[str] = []
    for make in (_lengths, _graphs):
        try:
            figures += make(history, folder)
        except UserError as error:
            logger.warning("%s", error)
            missing.append(str(error))
    return figures, missing


def _lengths(history: History, folder: Path) -> list[Path]:
    return [plot_lengths(history, training_lengths(history.config), folder)]


def _graphs(history: History, folder: Path) -> list[Path]:
    if history.config.model.objective == "mlm":
        return []
    checkpoint = newest_checkpoint(history.folder)
    _, step, inspections = inspect_checkpoint(checkpoint)
    subtitle = f"{history.name} ({history.kind}), step {step}, held-out sequences; budget: {history.budget}"
    graphs = [
        plot_state_graph(one, folder, subtitle, f"state_graph_{number}") for number, one in enumerate(inspections, 1)
    ]
    loaded = load_checkpoint(checkpoint, device="cpu")
    if loaded.tokenizer.domain == "smiles":
        graphs.insert(0, plot_molecules(loaded, inspections, folder))
    return [plot_transitions(inspections, folder, subtitle), plot_alignment(inspections, folder, subtitle), *graphs]


def _page(histories: Sequence[History], table: str, ablated: list[str], figures: list[Path], missing: list[str]) -> str:
    names = ", ".join(history.name for history in histories)
    parts = [
        f"# {names}\n",
        f"Written {time.strftime('%Y-%m-%d %H:%M')}. Every number below is of the budget named beside it.\n",
        "## Comparison\n",
        table,
        "\nnll (nats, each masked token by itself), joint nll (all of a sequence at once) and accuracy are per masked "
        "token of held-out sequences, at the same positions for all runs.\n",
    ]
    if len(histories) > 1:
        parts += ["## Settings that differ\n", _differences(histories)]
    if changes := [line for history in histories if (line := _changes(history))]:
        parts += ["## Settings changed during training\n", *changes]
    if ablated:
        parts += ["## Ablation\n", *ablated]
    parts += ["## Figures\n", *(f"![{path.stem.replace('_', ' ')}]({PLOTS}/{path.name})\n" for path in figures)]
    if missing:
        parts += ["## Not drawn\n", *(f"- {reason}\n" for reason in missing)]
    return "\n".join(parts)


def _differences(histories: Sequence[History]) -> str:
    first, *others = histories
    rows = [
        (other.name, key, old, new)
        for other in others
        for key, old, new in config_difference(first.config, other.config)
        if key != "name"
    ]
    lines = [f"| {name} | `{key}` | {json.dumps(old)} | {json.dumps(new)} |" for name, key, old, new in rows]
    return "\n".join([f"| run | setting | {first.name} | this run |", "| --- | --- | --- | --- |", *lines]) + "\n"


def _changes(history: History) -> str:
    """Settings that resumes have changed; empty if there are none."""
    tags = [event["values"] for event in read_events(history.folder / EVENTS) if event["kind"] == "tags"]
    said = [values[CHANGES] for values in tags if CHANGES in values]
    return f"{history.name}: {said[-1]}\n" if said and said[-1] != "none" else ""


def _evaluations(histories: Sequence[History]) -> str:
    return "\n".join(["## Evaluations of checkpoints\n", *map(_logged, histories)])


def _logged(history: History) -> str:
    events = [
        event
        for event in read_events(history.folder / EVENTS)
        if event["kind"] == "child_run" and "suite" not in event["tags"]
    ]
    if not events:
        return f"{history.name}: none logged.\n"
    lines = [
        f"| {event['step']} | {event['name']} | "
        + ", ".join(f"{key} {value:.4f}" for key, value in _shown(event["values"]).items())
        + f" | `{event['tags'].get('checkpoint.sha256', '')[:12]}` |"
        for event in events
    ]
    head = [
        f"{history.name} ({history.kind}, budget {history.budget}):\n",
        "| step | evaluation | result | weights (sha256) |",
        "| ---: | --- | --- | --- |",
    ]
    return "\n".join([*head, *lines]) + "\n"


def _shown(values: dict[str, float]) -> dict[str, float]:
    """Results under today's names (`objective_nll` was once called `joint_nll`), without those that a figure shows."""
    before = not any(name.endswith("/objective_nll") for name in values)
    named = {name.replace("/joint_nll", "/objective_nll") if before else name: one for name, one in values.items()}
    return {name: one for name, one in named.items() if "/alignment_" not in name}


def _record(home: Path, figures: list[Path]) -> None:
    log = EventLog(home / EVENTS)
    log.artifact(home / REPORT)
    log.artifact((home / REPORT).with_suffix(".html"))
    for path in figures:
        log.artifact(path, PLOTS)
    log.close()
    if read_history(home).config.tracking.mlflow:
        sync(home, timeout=TRACKING_PATIENCE)
