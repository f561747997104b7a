"""The report of a fine-tuned model: figures and a page of its metrics, from the files in its folder alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exlm_dist.analysis.finetuning_figures import plot_members, plot_target, plot_targets
from exlm_dist.analysis.finetuning_results import FinetuningResults, read_results
from exlm_dist.analysis.html_page import write_page
from exlm_dist.finetuning.finetune_settings import METRICS
from exlm_dist.finetuning.splits import PARTS

#: In the folder of the model; the figures are beside it.
PAGE = "report/report.md"
#: Of more targets, only the overview is drawn.
TARGETS_IN_DETAIL = 4
#: With fewer labels in a part its metrics are called noisy; so many targets are named.
FEW_LABELS, NAMED = 10, 10


def finetuning_report(model: Path) -> str:
    """Draw the figures of a fine-tuned model into MODEL/report/ and write the page `report.md` beside them; returns
    the text of the page. CheckpointError if MODEL is no fine-tuned model, or lacks one of its files."""
    results = read_results(Path(model))
    folder = (results.folder / PAGE).parent
    figures = [plot_members(results, folder)]
    if len(results.targets) > 1:
        figures.append(plot_targets(results, folder))
    if len(results.targets) <= TARGETS_IN_DETAIL:
        figures += [plot_target(results, number, folder) for number in range(len(results.targets))]
    page = _page(results, figures)
    write_page(results.folder / PAGE, page)
    return page


def _page(results: FinetuningResults, figures: Sequence[Path]) -> str:
    record = results.record
    rows, checkpoint, sizes = record["rows"], record["checkpoint"], record["split"]["sizes"]
    members = len(record["members"])
    parts = [
        f"# {results.folder.name}\n",
        f"- Task: {results.task}, {len(results.targets)} target{'s' if len(results.targets) > 1 else ''}, "
        f"{members} member{'s' if members > 1 else ''}",
        f"- Rows: {rows['read']} read, {rows['used']} used, {rows['failed']} failed"
        + (" (reasons: `failed.tsv`)" if rows["failed"] else ""),
        f"- Split: {record['split']['kind']}, "
        + ", ".join(f"{part} {sizes[part]}" for part in PARTS)
        + f" rows; hash `{record['split']['hash'][:12]}`",
        f"- Checkpoint: step {checkpoint['step']}, sha256 `{checkpoint['sha256'][:12]}`, "
        f"budget {record['budget'] or 'not labelled'}\n",
        "## Metrics\n",
        *_metrics(results),
        "\nMean and standard deviation (n - 1) over the members, each with the weights of its best epoch; of several "
        "targets the mean over those on which the metric is defined. The ensemble predicts the mean of its members.\n",
        "## Members\n",
        *_members(results),
        "\n## Targets\n",
        *_targets(results),
        "\n## Figures\n",
        *(f"![{path.stem.replace('_', ' ')}]({path.name})\n" for path in figures),
    ]
    if len(results.targets) > TARGETS_IN_DETAIL:
        parts.append(f"Figures of single targets are drawn for up to {TARGETS_IN_DETAIL} targets.\n")
    return "\n".join(parts)


def _metrics(results: FinetuningResults) -> list[str]:
    lines = ["| part | metric | mean | sd | ensemble |", "| --- | --- | ---: | ---: | ---: |"]
    ensemble = results.record["ensemble"]
    for part in results.parts:
        for name in METRICS[results.task]:
            value = results.record["metrics"][part][name]
            numbers = (value["mean"], value["sd"], ensemble[part][name])
            lines.append(f"| {part} | {name} | {' | '.join(map(_number, numbers))} |")
    for part in results.parts:
        if skipped := ensemble[part]["skipped"]:
            lines.append(f"\n{part}: {skipped:.0f} targets are left out, as all their labels are the same.")
    return lines


def _members(results: FinetuningResults) -> list[str]:
    lines = [f"| seed | epochs | best | {' | '.join(f'{part} {results.metric}' for part in results.parts)} |"]
    lines.append("| ---: | ---: | ---: |" + " ---: |" * len(results.parts))
    for member in results.record["members"]:
        scores = " | ".join(_number(member[part][results.metric]) for part in results.parts)
        lines.append(f"| {member['seed']} | {member['epochs']} | {member['best_epoch']} | {scores} |")
    return lines


def _targets(results: FinetuningResults) -> list[str]:
    """Labels of each target in each part: positives of all of two classes, counts of several, or values; and the
    metric of the ensemble in the part that figures show."""
    shown = results.shown_part
    lines = [f"| target | kind | {' | '.join(PARTS)} | {results.metric} ({shown}) |"]
    lines.append("| --- | --- |" + " --- |" * len(PARTS) + " ---: |")
    for number, target in enumerate(results.targets):
        counts = results.record["targets"][number]["counts"]
        cells = [_counted(target.kind, target.classes, counts[part]) for part in PARTS]
        score = _number(results.parts[shown][number].metrics[results.metric])
        lines.append(f"| {_cell(target.name)} | {target.kind} | {' | '.join(cells)} | {score} |")
    return [*lines, *_few_labels(results)]


def _few_labels(results: FinetuningResults) -> list[str]:
    """A line that says of which targets the metrics are noisy; none if there are none."""
    counts = [[one["counts"][part] for part in results.parts] for one in results.record["targets"]]
    few = [
        _cell(target.name)
        for target, of_parts in zip(results.targets, counts)
        if any(min(own.values()) < FEW_LABELS for own in of_parts)
    ]
    if not few:
        return []
    what = "labels" if results.task == "regression" else "labels of a class"
    names = ", ".join(few[:NAMED]) + (f" and {len(few) - NAMED} more" if len(few) > NAMED else "")
    return [f"\nFewer than {FEW_LABELS} {what} in the {' or '.join(results.parts)} part, so noisy metrics: {names}."]


def _counted(kind: str, classes: Sequence[str] | None, counts: dict[str, int]) -> str:
    total = sum(counts.values())
    if kind == "binary" and classes is not None:
        return f"{total}, positive ({_cell(classes[1])}): {counts[classes[1]]}"
    if classes is None:
        return f"{total}"
    return f"{total} ({_cell(', '.join(f'{label}: {counts[label]}' for label in classes))})"


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.4f}"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
