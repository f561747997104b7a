"""The report of an evaluation: one table of all methods, what pretraining buys, the data, and figures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exlm_dist.analysis.beside_published import beside_published
from exlm_dist.analysis.html_page import write_page
from exlm_dist.analysis.masked_report import write_masked_report
from exlm_dist.analysis.suite_figure import plot_split, plot_steps
from exlm_dist.finetuning.finetune_settings import ERRORS
from exlm_dist.suites.masked_cell import MASKED
from exlm_dist.suites.methods import RANDOM
from exlm_dist.suites.out_folder import read_suite
from exlm_dist.suites.pretraining_seeds import pooled_table
from exlm_dist.suites.suite_table import Column, Entry, Score, SuiteTable, difference, read_table
from exlm_dist.tables.table_writer import TableWriter
from exlm_dist.utils.locks import lock

REPORT, PAGE, CSV = "report", "report.md", "results.csv"
#: What the figures of a part are, and how the weights and the point of a grid are chosen.
_CHOSEN = {
    "test": "Test part, with the weights of the epoch that is the best on the validation part",
    "valid": "Validation part, as the labels of the test part are hidden. Where the protocol keeps the best epoch, and "
    "of several points of a grid, it is the best on this same part, as in published figures",
}
#: Unreadable rows of a task that are listed.
LISTED = 5


def suite_report(out: Path) -> Path:
    """Write report.md, the same as report.html, results.csv and the figures into OUT/report from all results in the
    folder; returns the page. CheckpointError if a file in the folder is damaged."""
    folder = out / REPORT
    folder.mkdir(exist_ok=True)
    with open(folder / ".lock", "w") as file:
        lock(file.fileno(), file.name, wait=True)  # of several processes the last one has all results
        if read_suite(out)["suite"] == MASKED:
            write_masked_report(out, folder)
            return folder / PAGE
        table = read_table(out)
        if table.entries:
            _write_csv(table, folder / CSV)
        splits = list(dict.fromkeys(split for _, split in table.rows))
        figures = [plot_split(table, split, folder) for split in splits]
        figures += [path for split in splits if (path := plot_steps(table, split, folder)) is not None]
        write_page(folder / PAGE, _page(table, figures))
    return folder / PAGE


def _page(table: SuiteTable, figures: Sequence[Path]) -> str:
    grid = table.suite["grid"]
    tried = f", {len(grid)} points of a grid" if len(grid) > 1 else ""
    changed = "".join(f", {name} {value}" for name, value in (grid[0] if len(grid) == 1 else []))
    parts = [
        f"# {table.suite['suite']}\n",
        f"Protocol `{table.suite['protocol']}`{changed}{tried}. {_CHOSEN[table.of.part]}; mean \u00b1 standard "
        "deviation (n - 1) over the seeds of the training, on one split. **Bold**: the best of a row.\n",
    ]
    if any(column.probe for column in table.columns):
        parts.append(
            "Linear: nothing is trained but a linear model on the embeddings, with the strength of regularisation that "
            "is the best on the validation part. That of a checkpoint has no randomness, hence no deviation.\n"
        )
    if any(column.training == "frozen" for column in table.columns):
        settings = ", ".join(f"{name} {value}" for name, value in table.of.probe.items() if name != "frozen")
        parts.append(
            "Frozen: the head alone is trained, on an encoder as pretraining has left it. What differs there from the "
            f"protocol: {settings}.\n"
        )
    for split in dict.fromkeys(split for _, split in table.rows):
        parts += [f"## Split: {split}\n", *score_rows(table, split), ""]
    if len(table.shown) < len(table.columns):
        parts.append("Of runs with many evaluated checkpoints the last one; all are in the figures by steps.\n")
    parts += ["## What pretraining buys\n", *_gains(table), ""]
    if (pooled := pooled_table(table)) is not None:
        parts += ["## Over the seeds of the pretraining\n", *_over_pretrainings(pooled), ""]
    parts += beside_rows(table)
    parts += [f"![{path.stem}]({path.name})\n" for path in figures]
    parts += ["## Checkpoints\n", *_checkpoints(table), "", "## Data\n", *_data(table), *_failures(table)]
    return "\n".join(parts) + "\n"


def score_rows(table: SuiteTable, split: str) -> list[str]:
    """A row for each task and for what else is shown of it, a column for each method, as lines of Markdown."""
    part = table.of.part
    tasks = [task for task, own in table.rows if own == split]
    lines = [
        f"| task | metric | {part} rows | {' | '.join(_cell(column.label) for column in table.shown)} |",
        "| --- | --- | --- |" + " ---: |" * len(table.shown),
    ]
    for task in tasks:
        for number, (own, metric) in enumerate([(part, table.metric(task)), *table.of.task(task).also]):
            name = task if own == part else f"{task} {own}"
            rows = _labels(table.tasks[task]["splits"][split], own) if number == 0 or own != part else ""
            lines.append(f"| {name} | {metric} | {rows} | {' | '.join(_row_scores(table, task, split, own, metric))} |")
    if mean := _mean_row(table, split, tasks):
        lines.append(mean)
    if constant := _constant(table, split, tasks):
        lines.append(f"\nAlways the same answer reaches: {', '.join(constant)}.")
    return lines


def beside_rows(table: SuiteTable) -> list[str]:
    """The section on what is published, as parts of a page of Markdown; empty if nothing is."""
    beside = beside_published(table)
    return ["## Beside the published figures\n", *beside, ""] if beside else []


def _over_pretrainings(pooled: SuiteTable) -> list[str]:
    """Tables and gains whose checkpoints are runs with several seeds."""
    lines = [
        "Runs that differ in their seeds alone are one column: mean \u00b1 sd (n - 1) over the runs, each with its "
        "mean over the seeds of the training. The other columns have the sd of the tables above.\n"
    ]
    for split in dict.fromkeys(split for _, split in pooled.rows):
        lines += [f"### Split: {split}\n", *score_rows(pooled, split), ""]
    return [*lines, *_gains(pooled)]


def _row_scores(table: SuiteTable, task: str, split: str, part: str, metric: str) -> list[str]:
    """A metric of a part for each method, the best in bold."""
    entries = [table.entries.get((task, split, column.key)) for column in table.shown]
    scores = [None if entry is None else entry.score(metric, part) for entry in entries]
    means = [score.mean for score in scores if score is not None and not math.isnan(score.mean)]
    best = (min if metric in ERRORS else max)(means, default=math.nan)
    return ["-" if score is None else _bold(_score(score), score.mean == best) for score in scores]


def _constant(table: SuiteTable, split: str, tasks: Sequence[str]) -> list[str]:
    """What an answer that is always the same reaches: for each part and task whose accuracy the table shows the
    commonest class of the training part, for questions that none has an answer."""
    found = []
    for task in tasks:
        counts = table.tasks[task]["splits"][split]["counts"]
        if table.of.task(task).kind == "answers":
            (own,) = counts[table.of.part].values()
            found.append(f"{task} {next(iter(own.values())) / sum(own.values()):.3f} (no answer)")
        for part, metric in ((table.of.part, table.metric(task)), *table.of.task(task).also):
            if metric == "accuracy":
                (train,), (own,) = counts["train"].values(), counts[part].values()
                fraction = own[max(train, key=lambda name: train[name])] / sum(own.values())
                found.append(f"{task if part == table.of.part else f'{task} {part}'} {fraction:.3f} (commonest class)")
    return found


def _mean_row(table: SuiteTable, split: str, tasks: Sequence[str]) -> str:
    """Means over the tasks that count in it, but for errors, and that all methods have results of; '' of less than
    two."""
    common = [
        task
        for task in tasks
        if table.metric(task) not in ERRORS
        and table.of.task(task).averaged
        and all((task, split, column.key) in table.entries for column in table.shown)
    ]
    if len(common) < 2:
        return ""
    means = [
        sum(table.entries[task, split, column.key].best.mean for task in common) / len(common) for column in table.shown
    ]
    metrics = list(dict.fromkeys(map(table.metric, common)))
    return f"| mean of {len(common)} | {', '.join(metrics)} | | {' | '.join(map(_number, means))} |"


def _gains(table: SuiteTable) -> list[str]:
    """Each checkpoint against what it has to be better than."""
    lines = []
    for column in table.shown:
        if column.kind != "checkpoint":
            continue
        for name, rivals in _rivals(table, column).items():
            compared = [_compared(table, row, column, rivals) for row in table.rows]
            known = [one for one in compared if one is not None]
            if known:
                counts = Counter(verdict for _, verdict in known)
                said = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
                lines.append(f"- **{_cell(column.label)}** against {name}: {said}.")
                lines += [f"    - {text}" for text, _ in known]
    if not lines:
        names = [RANDOM, *(one.name for one in table.of.baselines[:1])]
        return [f"Nothing to compare with: give {' and '.join(f'`{name}`' for name in names)} to `--checkpoint`."]
    return [
        f"Differences of the means on the {table.of.part} part, above 0 where the checkpoint is better, \u00b1 half of "
        "the 95 % interval (Welch) that the seeds of the training leave. No difference: the interval has 0 in it. It "
        "says nothing of other splits. Where there are several to compare with, the best on this part is taken.\n",
        *lines,
    ]


def _compared(
    table: SuiteTable, row: tuple[str, str], column: Column, rivals: Sequence[Column]
) -> tuple[str, str] | None:
    """(the difference in words, its verdict) of a row; None if there is nothing to compare."""
    own = table.entries.get((*row, column.key))
    other = table.best_of(row, rivals)
    if own is None or other is None:
        return None
    gain = difference(own, other)
    within = "" if math.isnan(gain.half_width) else f" \u00b1 {gain.half_width:.3f}"
    return f"{row[0]} {row[1]} {own.metric}: {gain.value:+.3f}{within}, {gain.verdict}", gain.verdict


def _rivals(table: SuiteTable, column: Column) -> dict[str, list[Column]]:
    """What a checkpoint is compared with: initial weights of its shape, the baselines, and of ExLM the plain models;
    all but the baselines trained as it is, frozen or not."""
    alike = [one for one in table.shown if one.training == column.training]
    shape, exlm = column.checkpoint["shape"], column.checkpoint["objective"] == "exlm"
    plain = [one for one in alike if one.kind == "checkpoint" and one.checkpoint["objective"] != "exlm"]
    return {
        "random initial weights": [one for one in alike if one.kind == RANDOM and one.checkpoint["shape"] == shape],
        **table.baselines,
        "the plain masked language model": plain if exlm else [],
    }


def _checkpoints(table: SuiteTable) -> list[str]:
    lines = ["| checkpoint | objective | step | budget | sha256 | truncated rows |", "| --- |" * 1 + " --- |" * 5]
    listed: set[str] = set()
    for column in table.shown:
        if column.kind == "checkpoint" and column.checkpoint["sha256"] not in listed:
            listed.add(column.checkpoint["sha256"])
            origin = column.checkpoint
            kind = f"ExLM, k={origin['states']}" if origin["objective"] == "exlm" else "plain MLM"
            cut = {e.task: e.truncated for e in table.entries.values() if e.method == column.key and e.truncated}
            lines.append(
                f"| {_cell(column.label)} | {kind} | {origin['step']} | {_cell(origin['budget'] or 'not labelled')} | "
                f"`{origin['sha256'][:12]}` | {', '.join(f'{task} {count}' for task, count in cut.items()) or 'none'} |"
            )
    return lines if len(lines) > 2 else ["None."]


def _data(table: SuiteTable) -> list[str]:
    splits = [(task, split, own) for task, recorded in table.tasks.items() for split, own in recorded["splits"].items()]
    names = list(dict.fromkeys(part for *_, own in splits for part in own["sizes"]))
    lines = [
        f"| task | split | {' | '.join(names)} | in an earlier part too | hash |",
        "| --- | --- |" + " --- |" * (len(names) + 2),
    ]
    for task, split, own in splits:
        parts = " | ".join(_labels(own, part) if part in own["sizes"] else "-" for part in names)
        repeated = ", ".join(f"{part} {count}" for part, count in own["repeated"].items() if count) or "none"
        lines.append(f"| {task} | {split} | {parts} | {repeated} | `{own['hash'][:12]}` |")
    if absent := [task.name for task in table.of.tasks if task.name not in table.tasks]:
        lines.append(f"\nNot evaluated here: {', '.join(absent)} ({len(absent)} tasks of the suite).")
    lines.append(
        "\nRows of each part, with their labels of class 1 of two in brackets; of several targets the fewest and the "
        "most. `splits/` has the part of every row, where the files do not say it.\n"
    )
    for task, recorded in table.tasks.items():
        rows = recorded["rows"]
        undefined = recorded["undefined_targets"]
        lines.append(
            f"- {task}: {rows['read']} rows, {rows['used']} used, {len(recorded['failed'])} unreadable or without label"
            f", {recorded['duplicates']} of an input that is there before"
            + (f", targets left out as all their labels are the same: {len(undefined)}" if undefined else "")
            + _unreadable(recorded["failed"])
        )
    return lines


def _unreadable(failed: Sequence[dict[str, Any]]) -> str:
    if not failed:
        return ""
    more = f" and {len(failed) - LISTED} more in `tasks/`" if len(failed) > LISTED else ""
    return " (" + "; ".join(f"row {one['row']}: {_cell(one['reason'])}" for one in failed[:LISTED]) + f"{more})"


def _failures(table: SuiteTable) -> list[str]:
    if not table.failures:
        return []
    lines = [
        f"- {one['task']} {one['split']} {_cell(one['method']['label'])} seed {one['seed']}: {_cell(one['reason'])}"
        for one in table.failures
    ]
    return ["\n## Failed\n", *lines]


def _labels(split: dict[str, Any], part: str) -> str:
    """Rows of a part, and of two classes the positive labels."""
    size, counts = split["sizes"][part], list(split["counts"][part].values())
    if any(len(own) != 2 for own in counts):
        return f"{size}"
    positive = [list(own.values())[1] for own in counts]
    return f"{size} ({min(positive)})" if len(positive) == 1 else f"{size} ({min(positive)} to {max(positive)})"


def _write_csv(table: SuiteTable, path: Path) -> None:
    """A row for each task, split, method, part and metric."""
    columns = {column.key: column for column in table.columns}
    rows = [
        _row(entry, columns[entry.method], part, metric)
        for entry in table.entries.values()
        for part in entry.results[0]["scores"]
        for metric in entry.results[0]["metrics"]
    ]
    with TableWriter(path, overwrite=True) as writer:
        writer.write({name: [row[name] for row in rows] for name in rows[0]})


def _row(entry: Entry, column: Column, part: str, metric: str) -> dict[str, Any]:
    score = entry.score(metric, part)
    skipped = entry.results[0]["scores"][part]["skipped"]
    return {
        "task": entry.task,
        "split": entry.split,
        "method": column.label,
        "kind": column.kind,
        "frozen": str(column.frozen).lower(),
        "probe": str(column.probe).lower(),
        "grid": " ".join(f"{name}={value}" for name, value in entry.grid.items()),
        "part": part,
        "metric": metric,
        "mean": score.mean,
        "sd": score.sd,
        "median": score.median,
        "seeds": score.seeds,
        "targets_left_out": int(skipped),
    }


def _score(score: Score) -> str:
    return _number(score.mean) + ("" if math.isnan(score.sd) else f" \u00b1 {score.sd:.3f}")


def _number(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.3f}"


def _bold(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
