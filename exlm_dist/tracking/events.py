"""`events.jsonl`: the durable record of a run, and the spool from which MLflow is fed.

Names of metrics across the package (unit):
`train/loss` (nats, as optimised), `train/nll` (nats per masked token), `train/accuracy` (fraction), `train/lr`,
`train/grad_norm`, `train/invalid_sequences` (count in the step), `valid/...` (docs/evaluation.md: `nll`, `accuracy`,
`perplexity`, `joint_nll`, `coupling`, `objective_nll`, `invalid`, of ExLM `alignment_...`),
`perf/tokens_per_second` (original tokens), `perf/expanded_tokens_per_second`, `perf/step_seconds`,
`perf/wait_seconds` (for data, per step), `perf/padding_fraction`, `perf/memory_megabytes` (peak of the process or
device), `progress/seconds` (training time so far, over all restarts), `progress/sequences`, `progress/tokens`,
`data/bad_records` (damaged records that this launch has replaced, on all ranks), `data/retries` (reads again),
`recheck/failed` (checks in which replicas differed so far; a point for every check).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from itertools import accumulate, islice
from pathlib import Path
from threading import Lock
from typing import Any

from exlm_dist.utils.locks import lock
from exlm_dist.utils.logs import get_logger

EVENTS = "events.jsonl"
#: Tag that lists the settings that were changed during the run.
CHANGES = "config.changes"
#: Metrics whose step counts measurements, not steps of training.
SYSTEM = "system/"
#: Kinds that describe the weights of one step.
OF_CHECKPOINTS = ("child_run", "checkpoint", "register")
#: What `json.dumps` makes of the kinds that decide which lines stand.
_RUN, _RESUMED = b'"kind": "run"', b'"kind": "resumed"'
logger = get_logger(__name__)


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Events of the complete lines of `path` that stand, in order; `values` are floats. Damaged lines are logged and
    skipped.

    Each has `time` (ms since 1970) and `kind`: run {uid, parent}, metrics {step, values}, params {values}, tags
    {values}, artifact {path, folder}, status {status}, child_run {name, step, values, tags, history}, checkpoint {step,
    values, tags}, register {name, step, why, tags}, resumed {step}.

    What lies before the last line `run` does not stand: that start of the run came to nothing. Nor do, before a line
    `resumed`, what is of later steps: the weights it describes were given up.
    """
    first, number_of_lines, resumed = _find_marks(path)
    limits = _lowest_from_each(resumed)
    with open(path, "rb") as file:
        for number, line in enumerate(islice(file, number_of_lines)):
            while resumed and resumed[0][0] <= number:
                del resumed[0], limits[0]
            if number < first:
                continue
            event = parse_event(line)
            if event is None:
                logger.warning("%s line %d is damaged and skipped", path, number + 1)
            elif not limits or _stands(event, limits[0]):
                yield event


def run_line(path: Path, offset: int) -> dict[str, Any] | None:
    """The last line `run` in the first `offset` bytes of `path`, or the first line of all; None if the file does not
    begin with one."""
    with open(path, "rb") as file:
        begun = parse_event(file.readline())
        if begun is None or begun["kind"] != "run":
            return None
        while file.tell() < offset:
            line = file.readline()
            if _RUN in line and (event := parse_event(line)) is not None and event["kind"] == "run":
                begun = event
    return begun


def _find_marks(path: Path) -> tuple[int, int, list[tuple[int, int]]]:
    """Number (from 0) of the last line `run`, how many complete lines there are, and (number, step) of the lines
    `resumed` after the former."""
    first, count, resumed = 0, 0, []
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            if (_RUN in line or _RESUMED in line) and (event := parse_event(line)) is not None:
                if event["kind"] == "run":
                    first, resumed = count, []
                elif event["kind"] == "resumed":
                    resumed.append((count, event["step"]))
            count += 1
    return first, count, resumed


def _lowest_from_each(resumed: list[tuple[int, int]]) -> list[int]:
    """The lowest step of each mark and those after it."""
    steps = [step for _, step in reversed(resumed)]
    return list(accumulate(steps, min))[::-1]


def _stands(event: dict[str, Any], limit: int) -> bool:
    """Whether the event stands where the run has gone back to step `limit`; its values that do not are removed."""
    if event["kind"] not in ("metrics", *OF_CHECKPOINTS) or event["step"] <= limit:
        return True
    if event["kind"] in OF_CHECKPOINTS:
        return False
    event["values"] = {name: value for name, value in event["values"].items() if name.startswith(SYSTEM)}
    return bool(event["values"])


def parse_event(line: bytes) -> dict[str, Any] | None:
    """The event in a line; None if it is not a valid event."""
    try:
        event = json.loads(line)
        if event["kind"] in ("metrics", "resumed", *OF_CHECKPOINTS):
            event["step"] = int(event["step"])
        if event["kind"] in ("metrics", "child_run", "checkpoint"):
            for point in (event, *event.get("history", ())):
                point["values"] = {name: float(value) for name, value in point["values"].items()}
        return event
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _to_json(values: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has neither NaN nor infinities: they are written as strings that `float` reads."""
    return {name: float(value) if math.isfinite(value) else str(float(value)) for name, value in values.items()}


class EventLog:
    """Appends events to a JSON-lines file, which a restart continues.

    A torn last line (the process was killed while writing) is cut off. A value whose (name, step) is already in the
    file is not written again, unless `resumed` has said that it stands no longer: no point stands twice. Safe to use
    from several threads; other processes may append too (`exlm evaluate` during training). A line that cannot be
    written (disk full) is logged and lost; training continues.

    parent: folder of the run below which MLflow is to show this one.
    """

    def __init__(self, path: Path, parent: Path | None = None) -> None:
        self.path = Path(path)
        self._lock = Lock()
        self._failing = False
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        with self._exclusive():
            self._cut_torn_line()
            empty = os.fstat(self._handle).st_size == 0
        if empty:
            self._append("run", uid=uuid.uuid4().hex, **({"parent": str(parent)} if parent is not None else {}))
        self._read()

    def resumed(self, step: int) -> None:
        """The run goes on after `step` steps. Where values or evaluations of later steps are in the file, they stand no
        longer: their weights were given up, and these steps are logged anew."""
        steps = [last for name, last in self._last_step.items() if not name.startswith(SYSTEM)]
        if max([*steps, *self._results, *(child for _, child in self._children)], default=step) > step:
            self._append("resumed", step=step)
            self._read()

    def begin_again(self) -> None:
        """The run starts anew, as another one: what the file has so far stands no longer, and MLflow gets a new run."""
        self.status("FAILED")
        self._append("run", uid=uuid.uuid4().hex)
        self._read()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Points of one step. Values whose name is already logged for this or a later step are skipped."""
        fresh = {name: value for name, value in values.items() if step > self._last_step.get(name, -1)}
        if fresh:
            self._last_step.update(dict.fromkeys(fresh, step))
            self._append("metrics", step=step, values=_to_json(fresh))

    def params(self, values: Mapping[str, Any]) -> None:
        """Settings of the run by dotted key: `{"model.width": 768}`."""
        self._append("params", values={key: str(value) for key, value in values.items()})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Labels of the run; a later value replaces an earlier one."""
        self._append("tags", values={key: str(value) for key, value in values.items()})

    def artifact(self, path: Path, folder: str = "") -> None:
        """A small file to be shown in MLflow, in `folder`. Its content is read when it is sent."""
        self._append("artifact", path=os.path.relpath(path, self.path.parent), folder=folder)

    def status(self, status: str) -> None:
        """RUNNING, FINISHED, KILLED (stopped by a signal; can be continued) or FAILED; ValueError for any other."""
        if status not in ("RUNNING", "FINISHED", "KILLED", "FAILED"):
            raise ValueError(f"unknown status {status!r}")
        self._append("status", status=status)

    def child_run(
        self,
        name: str,
        step: int,
        values: Mapping[str, float],
        tags: Mapping[str, Any],
        history: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:
        """Result of an evaluation of the checkpoint of `step`, or of a member of an ensemble, with points of its other
        steps as `history`; written once per (name, step)."""
        if (name, step) in self._children:
            return
        self._children.add((name, step))
        points = [{"step": other, "values": _to_json(point)} for other, point in (history or {}).items()]
        labels = {key: str(value) for key, value in tags.items()}
        self._append("child_run", name=name, step=step, values=_to_json(values), tags=labels, history=points)

    def checkpoint(self, step: int, values: Mapping[str, float], tags: Mapping[str, Any]) -> None:
        """Results of the checkpoint of `step` by which checkpoints are ranked, in any order of steps. Those that are
        logged with the same value are not written again."""
        known = self._results.setdefault(step, {})
        fresh = {name: value for name, value in values.items() if known.get(name) != value}
        if fresh:
            known.update(fresh)
            labels = {key: str(value) for key, value in tags.items()}
            self._append("checkpoint", step=step, values=_to_json(fresh), tags=labels)

    def register(self, step: int, name: str, why: str, tags: Mapping[str, Any]) -> None:
        """Have the checkpoint of `step` registered in MLflow as a version of the model `name`, and say `why`."""
        self._append("register", step=step, name=name, why=why, tags={key: str(value) for key, value in tags.items()})

    def last_step(self, name: str) -> int | None:
        """Last step with a value of the metric `name`; None if there is none."""
        return self._last_step.get(name)

    def flush(self) -> None:
        """Force everything written so far to disk (called with each checkpoint). That it cannot be is logged."""
        try:
            os.fsync(self._handle)
        except OSError as error:
            logger.warning("%s is not safe on the disk (%s)", self.path, error)

    def close(self) -> None:
        """Flush and close; the log cannot be used afterwards."""
        self.flush()
        os.close(self._handle)

    def _read(self) -> None:
        """Learn from the file what is logged already."""
        self._last_step: dict[str, int] = {}
        self._children: set[tuple[str, int]] = set()
        self._results: dict[int, dict[str, float]] = {}
        for event in read_events(self.path):
            if event["kind"] == "metrics":
                for name in event["values"]:
                    self._last_step[name] = max(event["step"], self._last_step.get(name, -1))
            elif event["kind"] == "child_run":
                self._children.add((event["name"], event["step"]))
            elif event["kind"] == "checkpoint":
                self._results.setdefault(event["step"], {}).update(event["values"])

    def _append(self, kind: str, **content: Any) -> None:
        line = (
            json.dumps({"time": time.time_ns() // 1_000_000, "kind": kind, **content}, allow_nan=False).encode() + b"\n"
        )
        with self._exclusive():
            size = os.fstat(self._handle).st_size
            try:
                if os.write(self._handle, line) < len(line):
                    raise OSError("only part of the line was written")
                self._failing = False
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._handle, size)
                if not self._failing:
                    logger.warning("%s cannot be written (%s): points are lost until that is fixed", self.path, error)
                self._failing = True

    def _cut_torn_line(self) -> None:
        """Cut off an incomplete last line, and last lines that are not events (a power cut leaves zeros)."""
        data = self.path.read_bytes()
        end = len(data)
        while end:
            start = data.rfind(b"\n", 0, end - 1) + 1
            if data[end - 1 : end] == b"\n" and parse_event(data[start:end]) is not None:
                break
            end = start
        if end < len(data):
            logger.warning("%s: %d bytes of an unfinished line at the end are cut off", self.path, len(data) - end)
            os.ftruncate(self._handle, end)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One writer at a time among threads and processes."""
        with self._lock:
            locked = lock(self._handle, self.path, wait=True)
            try:
                yield
            finally:
                if locked:
                    fcntl.flock(self._handle, fcntl.LOCK_UN)
