"""Each new checkpoint of a training evaluated as it lands."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from exlm_dist.checkpoint.reader import checkpoint_folders, step_of
from exlm_dist.suites.evaluate_suite import SuiteRequest, Summary, evaluate_suite, open_evaluation
from exlm_dist.suites.masked_suite import MaskedRequest, evaluate_masked, open_masked
from exlm_dist.tracking import EVENTS, read_events
from exlm_dist.utils.checkpoint_names import COMPLETE_FILE
from exlm_dist.utils.errors import CheckpointError, ConfigError
from exlm_dist.utils.locks import lock

PINNED = "pinned"
POLL = 5.0
#: Last words of a training that does not go on.
ENDED = ("FINISHED", "FAILED")


def watch_run(
    request: SuiteRequest | MaskedRequest,
    run: Path,
    *,
    idle: float,
    after_each: Callable[[], object] = lambda: None,
    say: Callable[[str], None] = print,
) -> Summary:
    """Evaluate each checkpoint of a run folder, lowest step first, until its training has ended, or has logged nothing
    for `idle` seconds. `after_each` is called when a checkpoint has been evaluated.

    A checkpoint is evaluated from hard links to its files, so the training may remove it meanwhile. Returns the sum of
    the summaries. CheckpointError if `run` is no run folder; ConfigError if another process watches for `request.out`.
    """
    run = Path(run).resolve()
    if not (run / EVENTS).is_file():
        raise CheckpointError(f"{run} is no run folder: it has no {EVENTS}. Give the folder of a run, say runs/NAME.")
    total, done = Summary(0, 0, 0, 0), set[str]()
    _open(request)
    with _pins(request.out) as pins:
        while True:
            ended = _ended(run, idle)  # asked before looking: what lands in between is seen in this round
            fresh = [folder for folder in reversed(checkpoint_folders(run)) if folder.name not in done]
            pinned = {str(folder): files for folder in fresh if (files := _pin(folder, pins)) is not None}
            for name, files in pinned.items():
                say(f"step {step_of(Path(name))}: {name}")
                own = replace(request, checkpoints=(*request.checkpoints, name), pinned={name: files})
                total = total.plus(evaluate(own, say))
                after_each()
                done.add(files.name)
                shutil.rmtree(files)
            if pinned:
                continue
            if ended:
                say(f"{ended}; checkpoints evaluated: {len(done)}")
                return total
            time.sleep(POLL)


def _open(request: SuiteRequest | MaskedRequest) -> None:
    if isinstance(request, MaskedRequest):
        open_masked(request)
    else:
        open_evaluation(request)


def evaluate(request: SuiteRequest | MaskedRequest, say: Callable[[str], None] = print) -> Summary:
    """Of either kind of suite."""
    if isinstance(request, MaskedRequest):
        return evaluate_masked(request, say)
    return evaluate_suite(request, say)


def _ended(run: Path, idle: float) -> str:
    """Why no more checkpoints are to be waited for; '' if the training goes on."""
    last = ""
    for event in read_events(run / EVENTS):
        if event["kind"] == "status":
            last = event["status"]
    if last in ENDED:
        return f"the training has ended ({last})"
    silent = time.time() - (run / EVENTS).stat().st_mtime
    return f"the training has logged nothing for {silent / 60:.0f} minutes" if silent > idle else ""


@contextmanager
def _pins(out: Path) -> Iterator[Path]:
    """The folder of the links, empty and this process's alone."""
    folder = out / PINNED
    folder.mkdir(exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            lock(file.fileno(), file.name)
        except BlockingIOError:
            raise ConfigError(f"{out}: another process watches a training for it. Choose another --out.") from None
        for left in folder.glob("step-*"):
            shutil.rmtree(left)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def _pin(folder: Path, pins: Path) -> Path | None:
    """The files of a whole checkpoint, linked, or copied from another file system; None if it is not whole, or is
    being removed."""
    target = pins / folder.name
    try:
        if (folder / COMPLETE_FILE).is_file():
            shutil.copytree(folder, target, copy_function=_link)
        if (folder / COMPLETE_FILE).is_file():
            return target
    except (OSError, shutil.Error):
        if folder.exists():
            raise
    shutil.rmtree(target, ignore_errors=True)
    return None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
