"""The report of the suite `masked`: one table of all checkpoints and ratios, and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exlm_dist.analysis.html_page import write_page
from exlm_dist.analysis.masked_figures import masked_figures, nearest
from exlm_dist.suites.masked_suite import RATIOS, REPEATED
from exlm_dist.suites.masked_table import MaskedTable, Point, point_of, read_masked_table
from exlm_dist.suites.suite_table import Column, Score
from exlm_dist.tables.table_writer import TableWriter
from exlm_dist.utils.files import write_json

PAGE, CSV, JSON = "report.md", "results.csv", "results.json"
#: (score, heading, how it is written) of the columns of the tables. Those that no checkpoint has are left out.
_OF_TOKENS = (
    ("nll", "nll", "nats"),
    ("joint_nll", "joint nll", "nats"),
    ("coupling", "coupling", "nats"),
    ("accuracy", "accuracy", "percent"),
    ("entropy", "entropy", "nats"),
    ("state_entropy", "of states", "nats"),
    ("ece", "ECE", "percent"),
)
_OF_COMPLETIONS = (
    ("exact", "all right", "percent"),
    ("exact_in_10", "in 10 best", "percent"),
    ("joint_accuracy", "tokens right", "percent"),
    ("joint_ece", "joint ECE", "percent"),
    ("single_entropy", "entropy", "nats"),
    ("joint_entropy", "joint entropy", "nats"),
    ("valid_best", "readable: best", "percent"),
    ("valid_independent", "each by itself", "percent"),
    ("valid_drawn", "drawn", "percent"),
)
_OF_STATES = (
    ("alignment_states_used", "states used", "number"),
    ("alignment_prior_entropy", "prior entropy", "nats"),
    ("alignment_posterior_entropy", "posterior entropy", "nats"),
    ("alignment_prior_own", "prior, own states", "percent"),
    ("alignment_posterior_own", "posterior, own states", "percent"),
    ("alignment_token_spread", "token spread", "number"),
)
_OF_REPEATED = (
    ("hidden_fraction", "tokens hidden", "percent"),
    ("hidden_nll", "nll of hidden", "nats"),
    ("hidden_accuracy", "accuracy of hidden", "percent"),
    ("copied_nll", "nll of others", "nats"),
    ("copied_accuracy", "accuracy of others", "percent"),
)
Columns = Sequence[tuple[str, str, str]]
#: The ratio at which the reliability table is written out.
_WRITTEN_OUT = 0.15


def write_masked_report(out: Path, folder: Path) -> None:
    """Write report.md, the same as report.html, results.csv, results.json and the figures into `folder`."""
    table = read_masked_table(out)
    figures = []
    if table.results:
        _write_csv(table, folder / CSV)
        write_json(folder / JSON, {"suite": table.suite, "tasks": table.tasks, "results": table.results})
        figures = masked_figures(table, folder)
    write_page(folder / PAGE, _page(table, figures))


def _page(table: MaskedTable, figures: Sequence[Path]) -> str:
    parts = [
        "# masked\n",
        "At the same ratio all checkpoints were asked for the same masked tokens. Nats and percentages are per masked "
        "token; mean ± standard deviation (n - 1) over the seeds of the masks, where there are several.\n",
    ]
    for point in table.differing:
        parts.append(f"**At {_named(point)} not all checkpoints were asked for the same tokens: do not compare.**\n")
    if table.points_of(RATIOS):
        parts += ["## By the ratio of masked tokens\n", *_table(table, RATIOS, _OF_TOKENS), ""]
        parts += ["### Completions\n", _completed(table), *_table(table, RATIOS, _OF_COMPLETIONS), ""]
        parts += ["### States\n", *_table(table, RATIOS, _OF_STATES), ""]
    if table.points_of(REPEATED):
        parts += ["## Repeated tokens\n", _REPEATED_NOTE, *_table(table, REPEATED, _OF_REPEATED), ""]
    parts += [f"![{path.stem}]({path.name})\n" for path in figures]
    if table.points_of(RATIOS):
        parts += ["## Calibration\n", *_reliability(table), ""]
    parts += ["## Checkpoints\n", *_checkpoints(table), "", "## Data\n", *_data(table), *_failures(table)]
    return "\n".join(parts) + "\n"


_REPEATED_NOTE = (
    "Each model at the ratio and with the copies that it was trained with. Hidden: tokens of which every copy is "
    "masked; of the others a copy is visible.\n"
)


def _table(table: MaskedTable, task: str, columns: Columns) -> list[str]:
    """A row for each point and checkpoint."""
    rows = [
        (point, column, table.entries[point, column.key])
        for point in table.points_of(task)
        for column in table.shown
        if (point, column.key) in table.entries
    ]
    known = [one for one in columns if any(entry.score(one[0]) is not None for _, _, entry in rows)]
    if not known:
        return ["Nothing to show: no checkpoint has it, or it was not asked for."]
    lines = [
        f"| masked | checkpoint | {' | '.join(heading for _, heading, _ in known)} |",
        "| ---: | --- |" + " ---: |" * len(known),
    ]
    for point, column, entry in rows:
        cells = [_written(entry.score(name), kind) for name, _, kind in known]
        lines.append(f"| {_named(point)} | {_cell(column.label)} | {' | '.join(cells)} |")
    return lines


def _named(point: Point) -> str:
    return f"{point.ratio:.4g}" + (f" x {point.copies}" if point.task == REPEATED else "")


def _written(score: Score | None, kind: str) -> str:
    if score is None:
        return "-"
    factor, digits = (100, 1) if kind == "percent" else (1, 4 if kind == "nats" else 2)
    mean, sd = factor * score.mean, factor * score.sd
    unit = " %" if kind == "percent" else ""
    mean = round(mean, digits) + 0.0  # no -0.0000
    within = "" if math.isnan(sd) else f" ± {sd:.{digits}f}"
    return f"{mean:.{digits}f}{within}{unit}"


def _completed(table: MaskedTable) -> str:
    return (
        f"Of the first {table.suite['complete']} sequences. All right: every masked token of the best completion by "
        "their joint probability; readable: molecules that RDKit reads, of the best completion, of the one with the "
        "most probable token of each mask by itself, and of completions that are drawn.\n"
    )


def _reliability(table: MaskedTable) -> list[str]:
    """Bins of single tokens at one ratio."""
    point = nearest(table.points_of(RATIOS), _WRITTEN_OUT)
    lines = [
        f"Single tokens at {point.ratio:.0%} masked, in bins of the probability that the model gives its prediction.\n",
        "| checkpoint | probability | tokens | mean | right |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for column in table.shown:
        entry = table.entries.get((point, column.key))
        for one in [] if entry is None else entry.reliability("reliability"):
            limits = f"{one['above']:.3f} - {one['to']:.3f}"
            rates = f"{one['confidence']:.3f} | {one['accuracy']:.3f}"
            lines.append(f"| {_cell(column.label)} | {limits} | {one['count']} | {rates} |")
    return lines


def _checkpoints(table: MaskedTable) -> list[str]:
    lines = ["| checkpoint | kind | budget | weights | folder |", "| --- | --- | --- | --- | --- |"]
    for column in table.shown:
        lines.append(f"| {_cell(column.label)} | {' | '.join(map(_cell, _origin(column)))} |")
    return lines


def _origin(column: Column) -> list[str]:
    own = column.checkpoint
    kind = f"ExLM, k = {own['states']}" if own["objective"] == "exlm" else "plain"
    return [kind, own["budget"] or "not labelled", own["sha256"][:12], own["path"]]


def _data(table: MaskedTable) -> list[str]:
    lines = []
    for task, own in table.tasks.items():
        skipped = f", {own['skipped']} longer ones before them left out" if own["skipped"] else ""
        lines.append(
            f"- `{task}`: {own['file']} ({table.suite['part']}, sha256 {own['sha256'][:12]}), {own['sequences']} "
            f"sequences of at most {own['longest']} tokens{skipped}."
        )
        if own.get("rows", {}).get("failed"):
            lines.append(f"  {own['rows']['failed']} of {own['rows']['read']} rows cannot be used:")
            lines += [f"    - {_cell(reason)}" for reason in own["reasons"]]
    return lines


def _failures(table: MaskedTable) -> list[str]:
    if not table.failures:
        return []
    lines = ["", "## Failed\n"]
    for one in table.failures:
        lines.append(f"- {_named(point_of(one))} {_cell(one['method']['label'])} seed {one['seed']}: {one['reason']}")
    return lines


def _write_csv(table: MaskedTable, path: Path) -> None:
    """A row for each cell."""
    rows = [_row(result) for result in table.results]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with TableWriter(path, overwrite=True) as writer:
        writer.write({name: [_text(row.get(name)) for row in rows] for name in names})


def _row(result: dict[str, Any]) -> dict[str, Any]:
    point, own = point_of(result), result["checkpoint"]
    (scores,) = result["scores"].values()
    return {
        "task": point.task,
        "ratio": point.ratio,
        "copies": point.copies,
        "checkpoint": result["method"]["label"],
        "run": own["run"],
        **{name: own[name] for name in ("step", "objective", "states", "budget", "sha256")},
        "seed": result["seed"],
        **scores,
        "positions": result["positions"],
        "seconds": result["seconds"],
    }


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
