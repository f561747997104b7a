"""Sends `events.jsonl` to MLflow: in a daemon thread during training, by `sync` afterwards."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

from exlm_dist.config import RunConfig, flatten, load_stored
from exlm_dist.tracking.events import EVENTS, EventLog, parse_event, run_line
from exlm_dist.tracking.store import MlflowRun, RunGone, import_mlflow
from exlm_dist.tracking.system import SystemSampler
from exlm_dist.tracking.uri import redact, tracking_uri
from exlm_dist.utils.errors import CheckpointError, ConfigError
from exlm_dist.utils.files import write_json
from exlm_dist.utils.locks import lock
from exlm_dist.utils.logs import get_logger
from exlm_dist.utils.version import VERSION

POSITION = "tracking.json"
CHUNK = 1 << 16
POLL = 2.0
LONGEST_PAUSE = 60.0
LAST_ATTEMPTS = 3
logger = get_logger(__name__)


@dataclass(frozen=True)
class SyncReport:
    """How far sending has come; true if everything is in MLflow."""

    run_folder: Path
    uri: str
    run_id: str | None
    remaining: int
    error: str | None

    def __bool__(self) -> bool:
        return self.remaining == 0 and self.error is None

    def __str__(self) -> str:
        if self:
            return f"{self.run_folder.name}: everything is in MLflow ({self.uri}, run {self.run_id})"
        return (
            f"{self.run_folder.name}: {self.remaining} lines of {EVENTS} are not in MLflow yet "
            f"({self.uri}: {self.error}). "
            f"Nothing is lost; send them with: exlm sync {self.run_folder}"
        )


class Shipper:
    """Sends the events of a run from the position in `tracking.json` on."""

    def __init__(self, run_folder: Path, uri: str, experiment: str) -> None:
        self.folder = Path(run_folder)
        self.uri, self.experiment = uri, experiment
        self.error: str | None = None
        self._failures, self._successes = 0, 0
        self._stop, self._wake, self._finishing = Event(), Event(), Event()
        self._run: MlflowRun | None = None

    def position(self) -> dict[str, Any]:
        """`{"uri", "run_id", "offset"}`; the start of the file if nothing was sent to this URI yet."""
        start = {"uri": redact(self.uri), "run_id": None, "offset": 0}
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            saved = json.loads((self.folder / POSITION).read_text())
            if saved.get("uri") == start["uri"] and saved.get("offset", 0) <= self._size():
                return {**start, **saved}
        return start

    def remaining(self) -> int:
        """Number of lines not sent yet."""
        with open(self.folder / EVENTS, "rb") as file:
            file.seek(self.position()["offset"])
            return file.read().count(b"\n")

    def report(self) -> SyncReport:
        """State now; complete only if MLflow has answered in this session."""
        remaining = self.remaining()
        error = self.error or ("time is up" if remaining or not self._successes else None)
        return SyncReport(self.folder, redact(self.uri), self.position()["run_id"], remaining, error)

    def send_all(self) -> None:
        """Send until nothing is left. Raises what MLflow raises; the position then includes what was sent before."""
        with _only_sender(self.folder):
            position = self.position()
            try:
                self._open(position)
                while self._send_chunk(position) and not self._stop.is_set():
                    pass
            except RunGone as gone:
                logger.warning("MLflow no longer has run %s: everything is sent again, to a new one", gone)
                self._run = None
                self._save({**position, "run_id": None, "offset": 0})
                raise

    def start(self) -> Shipper:
        """Start the thread that sends and waits for more; after each failure in a row it waits longer."""
        Thread(target=self._work, name="mlflow", daemon=True).start()
        return self

    def finish(self, timeout: float) -> SyncReport:
        """Let the thread send what is left, for at most `timeout` seconds or a few failures, and end it."""
        deadline, failures = time.monotonic() + timeout, self._failures + LAST_ATTEMPTS
        self._finishing.set()
        self._wake.set()
        while (self.remaining() or not self._successes) and self._failures < failures and time.monotonic() < deadline:
            time.sleep(0.05)
        self._stop.set()
        self._wake.set()
        return self.report()

    def _work(self) -> None:
        pause = POLL
        while not self._stop.is_set():
            try:
                self.send_all()
                if self.error:
                    logger.info("MLflow answers again; everything was sent")
                self.error, pause = None, POLL
                self._successes += 1
            except Exception as error:  # nothing that MLflow raises may end the thread: the points are in events.jsonl
                self._report_failure(error)
                pause = min(2 * pause, LONGEST_PAUSE)
            self._wake.wait(0.5 if self._finishing.is_set() else pause)
            self._wake.clear()

    def _report_failure(self, error: Exception) -> None:
        message = redact(f"{type(error).__name__}: {error}").splitlines()[0][:300]
        if self.error is None:
            logger.warning("MLflow cannot be reached; training continues and points stay in %s (%s)", EVENTS, message)
        self.error = message
        self._failures += 1

    def _send_chunk(self, position: dict[str, Any]) -> bool:
        """Send the next complete lines, up to the next line `run`, and save the new position; False if there were
        none."""
        with open(self.folder / EVENTS, "rb") as file:
            file.seek(position["offset"])
            data = file.read(CHUNK)
            while data and b"\n" not in data and (more := file.read(CHUNK)):
                data += more
        data = data[: data.rfind(b"\n") + 1]
        if not data:
            return False
        lines = data.splitlines(keepends=True)
        events = [parse_event(line) for line in lines]
        first, *later = events
        if first is not None and first["kind"] == "run" and position["offset"]:
            self._switch(first, None, position)
        stop = next((number for number, event in enumerate(later, 1) if event and event["kind"] == "run"), len(lines))
        assert self._run is not None
        self._run.send([event for event in events[:stop] if event is not None])
        position["offset"] += sum(map(len, lines[:stop]))
        self._save(position)
        return True

    def _open(self, position: dict[str, Any]) -> None:
        """The run in MLflow to which the next lines belong, found or created by the first call."""
        if self._run is not None:
            return
        begun = run_line(self.folder / EVENTS, position["offset"])
        if begun is None:
            raise CheckpointError(
                f"{self.folder / EVENTS} does not begin with the line of the run's uid. Restore it from a copy."
            )
        self._switch(begun, position["run_id"], position)

    def _switch(self, begun: dict[str, Any], known: str | None, position: dict[str, Any]) -> None:
        """Send what follows to the MLflow run of the line `run` that is `begun`; `known`: its id."""
        runs, uid, start = runs_folder(self.folder), begun["uid"], begun["time"]
        parent = _uid_of(_parent_of(self.folder))
        self._run = MlflowRun(self.uri, self.experiment, runs, self.folder, uid, known, start, parent)
        position["run_id"] = self._run.run_id
        self._save(position)

    def _save(self, position: dict[str, Any]) -> None:
        write_json(self.folder / POSITION, position)

    def _size(self) -> int:
        return (self.folder / EVENTS).stat().st_size


class Tracker:
    """Tracking of one training session, on rank 0. `start` returns at once; `close` waits for a limited time."""

    def __init__(self, log: EventLog, shipper: Shipper | None, sampler: SystemSampler | None) -> None:
        self._log, self._sampler = log, sampler
        self._shipper = shipper.start() if shipper is not None else None

    @classmethod
    def start(
        cls,
        run_folder: Path,
        config: RunConfig,
        log: EventLog,
        *,
        tags: dict[str, Any] | None = None,
        system_interval: float = 10.0,
    ) -> Tracker:
        """Log settings, tags and `config.yaml` of the run, and start the threads.

        Whatever hinders MLflow (an address that it does not accept, no package, no answer) is only a warning: the
        events stay in the run folder for `exlm sync`.
        """
        run_folder = Path(run_folder)
        log.status("RUNNING")
        log.params({key: redact(str(value)) for key, value in flatten(config).items()})
        log.tags({**run_tags(config, run_folder), **(tags or {})})
        if (run_folder / "config.yaml").is_file():
            log.artifact(run_folder / "config.yaml")
        sampler = SystemSampler(log, system_interval) if config.tracking.system else None
        return cls(log, _shipper(run_folder, config) if config.tracking.mlflow else None, sampler)

    def close(self, status: str, timeout: float = 30.0) -> SyncReport | None:
        """Log the final status and send what is left, for at most `timeout` seconds; reports what remains.

        None if MLflow is off. The log stays open.
        """
        if self._sampler is not None:
            self._sampler.close()
        self._log.status(status)
        self._log.flush()
        if self._shipper is None:
            return None
        report = self._shipper.finish(timeout)
        logger.log(logging.INFO if report else logging.WARNING, "%s", report)
        return report


def sync(run_folder: Path, timeout: float = 60.0) -> SyncReport:
    """Send what MLflow has not received of a run, for at most `timeout` seconds, and print the report.

    CheckpointError if `run_folder` is not the folder of a run.
    """
    run_folder = Path(run_folder)
    for name in (EVENTS, "config.yaml"):
        if not (run_folder / name).is_file():
            raise CheckpointError(
                f"{run_folder} is no run folder: it has no {name}. Give the folder of a run, say runs/NAME."
            )
    config = load_stored(run_folder / "config.yaml")
    uri = tracking_uri(config.tracking.uri, runs_folder(run_folder))
    shipper = Shipper(run_folder, uri, config.tracking.experiment)
    report = shipper.start().finish(timeout)
    print(report, flush=True)
    return report


def runs_folder(run_folder: Path) -> Path:
    """The folder of runs whose `mlflow.db` has this one: that of the run below which it is shown, or its own."""
    return (_parent_of(run_folder) or run_folder).parent


def run_tags(config: RunConfig, run_folder: Path) -> dict[str, str]:
    """Tags by which runs are found and told apart in MLflow. Of the environment, only the Slurm job id."""
    model = config.model
    prior = "" if model.jump_prior == "none" else f", {model.jump_prior} prior"
    exlm = f"ExLM, k={model.states}, {model.transitions} transitions{prior}"
    kind = exlm if model.objective == "exlm" else "plain MLM"
    note = (
        f"**{kind}** · {model.layers} layers × {model.width} wide × {model.heads} heads · "
        f"{config.schedule.steps} steps × "
        f"{config.batch.sequences} sequences · budget {config.budget or 'not labelled'}\n\n"
        f"data `{config.data.described}` · run folder `{run_folder.resolve()}` · "
        f"`exlm report {run_folder}` draws its figures"
    )
    tags = {
        "mlflow.note.content": note,
        "objective": model.objective,
        "states": str(model.states),
        "transitions": model.transitions,
        "jump_prior": model.jump_prior,
        "budget": config.budget or "not labelled",
        "seed": str(config.seed),
        "host": platform.node(),
        "exlm_dist": VERSION,
    }
    if job := os.environ.get("SLURM_JOB_ID"):
        tags["slurm_job"] = job
    return tags


def _parent_of(run_folder: Path) -> Path | None:
    """Folder of the run below which this one is shown; None if there is none, or it is gone."""
    begun = run_line(run_folder / EVENTS, 0)
    parent = None if begun is None or "parent" not in begun else Path(begun["parent"])
    return parent if parent is not None and (parent / EVENTS).is_file() else None


def _uid_of(run_folder: Path | None) -> str | None:
    """Uid of the run that a folder has now; None if there is no folder."""
    if run_folder is None:
        return None
    begun = run_line(run_folder / EVENTS, (run_folder / EVENTS).stat().st_size)
    return None if begun is None else begun["uid"]


def _shipper(run_folder: Path, config: RunConfig) -> Shipper | None:
    """Imports mlflow in the calling thread: when two threads import at once, one may see half-initialised modules."""
    try:
        uri = tracking_uri(config.tracking.uri, run_folder.parent)
        import_mlflow()
    except ConfigError as error:
        why = str(error)
    except Exception as error:  # packages that do not suit one another raise anything while they are imported
        why = f"mlflow cannot be imported: {redact(f'{type(error).__name__}: {error}')}"
    else:
        return Shipper(run_folder, uri, config.tracking.experiment)
    logger.warning("nothing is sent to MLflow (%s) Events stay in %s; later: exlm sync %s", why, EVENTS, run_folder)
    return None


@contextlib.contextmanager
def _only_sender(folder: Path) -> Iterator[None]:
    """Two processes that send the same run would each create it in MLflow. The lock ends with its process."""
    with open(folder / ".tracking.lock", "w") as file:
        try:
            lock(file.fileno(), file.name)
        except BlockingIOError:
            raise RuntimeError("another process is sending this run right now") from None
        yield
