"""The evaluations by suites that runs have had, in the report of these runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from exlm_dist.analysis.suite_report import PAGE, REPORT, beside_rows, score_rows
from exlm_dist.evaluation.history import History
from exlm_dist.suites.out_folder import is_suite_folder
from exlm_dist.suites.suite_table import read_table
from exlm_dist.tracking import EVENTS, read_events

#: Ending of the tags that say where the folder of an evaluation is.
FOLDER = ".folder"


def judged_by_suites(histories: Sequence[History], home: Path) -> list[str]:
    """A section for each evaluation that has results of these runs and is still where it was, as parts of a page of
    Markdown in `home`."""
    folders: dict[str, None] = {}
    for history in histories:
        for event in read_events(history.folder / EVENTS):
            if event["kind"] == "checkpoint":
                folders |= {value: None for key, value in event["tags"].items() if key.endswith(FOLDER)}
    parts: list[str] = []
    for folder in (Path(name) for name in folders if is_suite_folder(Path(name))):
        table = read_table(folder)
        page = os.path.relpath(folder / REPORT / PAGE, home)
        parts += [
            f"## Downstream: {table.suite['suite']}\n",
            f"Protocol `{table.suite['protocol']}`; {table.of.part} part, mean \u00b1 sd over the seeds. The whole "
            f"report: [{page}]({page}).\n",
        ]
        for split in dict.fromkeys(split for _, split in table.rows):
            parts += [f"### Split: {split}\n", *score_rows(table, split), ""]
        parts += beside_rows(table)
    return parts
