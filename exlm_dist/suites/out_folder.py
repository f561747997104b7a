"""The folder of an evaluation: what it is of, its tasks with their splits, and that no two evaluations mix in it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.finetuning.splits import Parts
from exlm_dist.suites.suite import OFFICIAL, Suite, Task
from exlm_dist.suites.task_data import TaskData
from exlm_dist.tables.table_writer import TableWriter
from exlm_dist.utils.errors import CheckpointError, ConfigError, DataError, UserError
from exlm_dist.utils.files import write_json

FORMAT = 1
SUITE_FILE = "suite.json"
TASKS, SPLITS = "tasks", "splits"


@dataclass(frozen=True)
class PreparedTask:
    """A task with its files. splits: the hash of each that can be used; problems: why another cannot."""

    task: Task
    files: tuple[Path, ...]
    splits: dict[str, str]
    problems: dict[str, str]


def open_folder(out: Path, request: Mapping[str, Any]) -> None:
    """Make the folder of an evaluation, or go on in one that was begun with the same `request`. ConfigError if it was
    begun with another one, which names the differences, or is another kind of folder."""
    path = out / SUITE_FILE
    if not path.is_file():
        # What begins with a dot is the file that another process writes at this moment.
        if out.is_file() or (out.is_dir() and any(not inner.name.startswith(".") for inner in out.iterdir())):
            raise ConfigError(f"{out}: exists and is not the folder of an evaluation. Choose another --out.")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{out}: cannot be made: {error.strerror}. Choose another --out.") from error
        write_json(path, {"format": FORMAT, **request})
    begun = read_suite(out)
    names = sorted(name for name in request if begun.get(name) != request[name])
    if names:
        changes = "; ".join(f"{name} was {begun.get(name)!r}, now {request[name]!r}" for name in names)
        raise ConfigError(
            f"{out} was begun with other settings ({changes}). Give those it was begun with and it goes on, choose "
            f"another --out, or begin anew: rm -r {shlex.quote(str(out))}"
        )


def is_suite_folder(path: Path) -> bool:
    """Whether `exlm evaluate SUITE` wrote this folder."""
    return (Path(path) / SUITE_FILE).is_file()


def read_suite(out: Path) -> dict[str, Any]:
    """What an evaluation is of. CheckpointError if the file that says it is damaged or of another format."""
    try:
        content = json.loads((out / SUITE_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{out / SUITE_FILE} is damaged ({error}). Begin anew in another --out.") from error
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{out}: is of format {content.get('format')}; this version of exlm_dist reads {FORMAT}.")
    return content


def read_tasks(out: Path) -> dict[str, dict[str, Any]]:
    """What is recorded of each task, by its name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / TASKS).glob("*.json"))}


def prepare_tasks(
    suite: Suite, names: Sequence[str], data: Path, splits: Sequence[str], out: Path
) -> tuple[list[PreparedTask], list[str]]:
    """(the tasks with their rows and splits written to `out`, names of those whose file is not there).

    names: the tasks that are asked for; empty: all whose file is there. A split that cannot be used, or a file that
    cannot be read, is a problem of its task alone. DataError if a file that is asked for is missing, or all are;
    ConfigError if `out` has been begun with another file.
    """
    if not data.is_dir():
        raise DataError(f"{data}: is no folder. --data is the folder with the files of {suite.name}.")
    tasks = [suite.task(name) for name in names] or list(suite.tasks)
    files = {task.name: task.find(data) for task in tasks}
    missing = [name for name, found in files.items() if None in found.values()]
    if missing and (names or len(missing) == len(tasks)):
        absent = [known for name in missing for known, path in files[name].items() if path is None]
        raise DataError(
            f"{data}: has no file for {', '.join(missing)} (looked for {', '.join(absent)}, compressed or not)."
        )
    (out / TASKS).mkdir(exist_ok=True)
    (out / SPLITS).mkdir(exist_ok=True)
    whole = [(task, [path for path in files[task.name].values() if path is not None]) for task in tasks]
    prepared = [_prepared(task, tuple(found), splits, out) for task, found in whole if task.name not in missing]
    return prepared, missing


def _prepared(task: Task, files: tuple[Path, ...], splits: Sequence[str], out: Path) -> PreparedTask:
    try:
        data = task.read(files)
    except UserError as error:
        return PreparedTask(task, files, {}, dict.fromkeys(splits, str(error)))
    recorded = read_tasks(out).get(task.name, {**data.described(), "splits": {}})
    if recorded["sha256"] != data.sha256:
        raise ConfigError(
            f"{out}: was begun with another file for {task.name} ({' '.join(recorded['files'])}, sha256 "
            f"{recorded['sha256'][:12]}; {' '.join(map(str, files))} has {data.sha256[:12]}). Choose another --out."
        )
    found, problems = {}, {}
    for split in splits:
        try:
            parts = data.split(split)
        except UserError as error:
            problems[split] = str(error)
            continue
        recorded["splits"][split] = data.described_split(parts)
        found[split] = recorded["splits"][split]["hash"]
        if split != OFFICIAL:
            _write_split(out / SPLITS / f"{task.name}-{split}.csv", data, parts)
    write_json(out / TASKS / f"{task.name}.json", recorded)
    return PreparedTask(task, files, found, problems)


def _write_split(path: Path, data: TaskData, parts: Parts) -> None:
    """The part of each used row, by its number in the file."""
    part_of = np.empty(len(data.places), object)
    for part, rows in parts.items():
        part_of[rows] = part
    with TableWriter(path, overwrite=True) as table:
        table.write({"row": np.array([row for _, row in data.places]), "part": part_of.tolist(), **data.columns})
