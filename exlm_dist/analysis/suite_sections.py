"""The evaluations by suites that runs have had, in the report of these runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from exlm_dist.analysis.suite_report import PAGE, REPORT, beside_rows, score_rows
from exlm_dist.evaluation.history import History
from exlm_dist.suites.catalogue import SUITES
from exlm_dist.suites.out_folder import is_suite_folder, read_suite
from exlm_dist.suites.suite_table import SuiteTable, read_table
from exlm_dist.tracking import EVENTS, read_events

#: Ending of the tags that say where the folder of an evaluation is.
FOLDER = ".folder"


def suite_tables(histories: Sequence[History]) -> list[SuiteTable]:
    """Those of the evaluations by tasks that have results of these runs and are still where they were."""
    folders: dict[Path, None] = {}
    for history in histories:
        for event in read_events(history.folder / EVENTS):
            if event["kind"] == "checkpoint":
                folders |= {Path(value): None for key, value in event["tags"].items() if key.endswith(FOLDER)}
    found = [folder for folder in folders if is_suite_folder(folder)]
    return [read_table(folder) for folder in found if read_suite(folder)["suite"] in SUITES]


def judged_by_suites(tables: Sequence[SuiteTable], home: Path) -> list[str]:
    """A section for each evaluation, as parts of a page of Markdown in `home`."""
    parts: list[str] = []
    for table in tables:
        page = os.path.relpath(table.folder / REPORT / PAGE, home)
        parts += [
            f"## Downstream: {table.suite['suite']}\n",
            f"Protocol `{table.suite['protocol']}`; {table.of.part} part, mean \u00b1 sd over the seeds. The whole "
            f"report: [{page}]({page}).\n",
        ]
        for split in dict.fromkeys(split for _, split in table.rows):
            parts += [f"### Split: {split}\n", *score_rows(table, split), ""]
        parts += beside_rows(table)
    return parts
