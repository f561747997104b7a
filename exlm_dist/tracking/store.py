"""One training as one MLflow run. The only module that imports mlflow; every call may fail or block."""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from exlm_dist.tracking.checkpoint_models import UID_TAG, CheckpointModels
from exlm_dist.tracking.uri import redact
from exlm_dist.utils.locks import lock
from exlm_dist.utils.logs import get_logger

POINTS_PER_CALL = 1000
PAIRS_PER_CALL = 100
LONGEST_PARAM = 500
LONGEST_TAG = 5000
LARGEST_ARTIFACT = 50 * 2**20
#: Child runs that one query returns.
MOST_CHILDREN = 10_000
#: Appended to the names of those whose weights were given up.
GIVEN_UP = " (weights given up)"
#: Without the kind, MLflow opens the experiment with its tools for chat applications.
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": "`valid/nll`, `valid/joint_nll` and `valid/accuracy` (per masked token) compare across "
    "objectives; `train/loss` and `valid/objective_nll` do not.",
}
_TEXT = (".yaml", ".md", ".json", ".txt")
logger = get_logger(__name__)


def import_mlflow() -> Any:
    """The mlflow module, with telemetry off, nothing printed and short timeouts, unless the user has set them."""
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("DO_NOT_TRACK", "true"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "10"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"),
    ):
        os.environ.setdefault(name, value)
    import mlflow

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    return mlflow


class RunGone(Exception):
    """MLflow no longer has this run: create it again and send everything from the start."""


class MlflowRun:
    """The MLflow run of one training, found by its id or its uid, else created.

    Args:
        uri: tracking URI. runs: folder of the run folders. uid: from the first line of `events.jsonl`.
        known: run id of an earlier session at the same URI, or None. start: its time of creation, ms since 1970.
        parent: uid of the run below which it is shown, if that one is there.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        runs: Path,
        run_folder: Path,
        uid: str,
        known: str | None,
        start: int,
        parent: str | None,
    ) -> None:
        mlflow = import_mlflow()
        self._entities = mlflow.entities
        self._failure = mlflow.exceptions.MlflowException
        self._folder, self._uid = run_folder, uid
        artifacts = (runs / "mlartifacts").resolve().as_uri() if uri.startswith("sqlite:") else None
        with _complete_database(mlflow, uri):
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            self._experiment = self._experiment_id(experiment, artifacts)
        self.run_id = known or self._find(uid) or self._create(run_folder.name, uid, start, {})
        self._check_active()
        self._models = CheckpointModels(self._client, self._experiment, self.run_id, run_folder.name, uid)
        if parent is not None and (above := self._find(parent)) is not None:
            self._log_tags(self.run_id, {"mlflow.parentRunId": above})

    def send(self, events: list[dict[str, Any]]) -> None:
        """Send events in order; sending them again changes nothing. What MLflow rejects is logged and skipped."""
        for is_points, group in groupby(events, key=lambda event: event["kind"] == "metrics"):
            if is_points:
                self._guarded(self._send_points, list(group))
            else:
                for event in group:
                    self._guarded(self._send_one, [event])

    def _guarded(self, call: Callable[[list[dict[str, Any]]], None], events: list[dict[str, Any]]) -> None:
        try:
            call(events)
        except self._failure as error:
            self._check_active()
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if len(events) > 1:
                for event in events:
                    self._guarded(call, [event])
            else:
                logger.warning(
                    "MLflow rejects an event of kind %s, which is skipped: %s", events[0]["kind"], redact(str(error))
                )

    def _check_active(self) -> None:
        try:
            stage = self._client.get_run(self.run_id).info.lifecycle_stage
        except self._failure as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise RunGone(self.run_id) from error
            raise
        if stage == "deleted":
            raise RuntimeError(
                f"run {self.run_id} was deleted in MLflow. Restore it (mlflow runs restore --run-id {self.run_id}), "
                f"or delete {self._folder / 'tracking.json'} to have a new one created"
            )

    def _experiment_id(self, name: str, artifacts: str | None) -> str:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return self._client.create_experiment(name, artifact_location=artifacts, tags=EXPERIMENT_TAGS)
            except self._failure as error:  # another run has created it meanwhile
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = self._client.get_experiment_by_name(name)
        if experiment.lifecycle_stage == "deleted":
            raise RuntimeError(
                f"experiment {name!r} was deleted in MLflow. Restore it there, or choose another tracking.experiment"
            )
        return experiment.experiment_id

    def _find(self, uid: str) -> str | None:
        found = self._client.search_runs([self._experiment], f"tags.`{UID_TAG}` = '{uid}'", max_results=1)
        return found[0].info.run_id if found else None

    def _create(self, name: str, uid: str, start: int, tags: dict[str, str]) -> str:
        own = {UID_TAG: uid, "mlflow.user": _user(), "mlflow.source.name": "exlm", "mlflow.source.type": "LOCAL"}
        return self._client.create_run(
            self._experiment, start_time=start, tags={**own, **tags}, run_name=name
        ).info.run_id

    def _send_points(self, events: list[dict[str, Any]]) -> None:
        self._log_points(self.run_id, events)

    def _log_points(self, run_id: str, events: list[dict[str, Any]], model: str | None = None) -> None:
        points = [
            self._entities.Metric(name, value, event["time"], event["step"], model_id=model)
            for event in events
            for name, value in event["values"].items()
        ]
        for piece in _pieces(points, POINTS_PER_CALL):
            self._client.log_batch(run_id, metrics=piece, synchronous=True)

    def _log_tags(self, run_id: str, tags: dict[str, str]) -> None:
        entries = [self._entities.RunTag(key, cut(redact(value), LONGEST_TAG)) for key, value in tags.items()]
        for piece in _pieces(entries, PAIRS_PER_CALL):
            self._client.log_batch(run_id, tags=piece, synchronous=True)

    def _send_one(self, events: list[dict[str, Any]]) -> None:
        (event,) = events
        senders = {
            "params": self._send_params,
            "tags": lambda e: self._log_tags(self.run_id, e["values"]),
            "artifact": self._send_artifact,
            "status": self._send_status,
            "child_run": self._send_child,
            "checkpoint": self._send_checkpoint,
            "register": lambda e: self._models.register(e["step"], e["name"], e["why"], e["tags"]),
            "resumed": self._send_resumed,
        }
        if event["kind"] in senders:
            senders[event["kind"]](event)

    def _send_params(self, event: dict[str, Any]) -> None:
        """Parameters cannot change in MLflow: a setting that a restart changes becomes a tag `resumed.<key>`."""
        wanted = {key: cut(redact(value), LONGEST_PARAM) for key, value in event["values"].items()}
        present = self._client.get_run(self.run_id).data.params
        fresh = [self._entities.Param(key, value) for key, value in wanted.items() if key not in present]
        for piece in _pieces(fresh, PAIRS_PER_CALL):
            self._client.log_batch(self.run_id, params=piece, synchronous=True)
        self._log_tags(
            self.run_id, {f"resumed.{key}": value for key, value in wanted.items() if present.get(key, value) != value}
        )

    def _send_artifact(self, event: dict[str, Any]) -> None:
        path = self._folder / event["path"]
        if not path.is_file() or path.stat().st_size > LARGEST_ARTIFACT:
            logger.warning(
                "%s is not sent to MLflow: %s", path, "larger than 50 MiB" if path.is_file() else "the file is gone"
            )
        elif path.suffix in _TEXT:
            target = "/".join(part for part in (event["folder"], path.name) if part)
            self._client.log_text(self.run_id, redact(path.read_text(encoding="utf-8")), target)
        else:
            self._client.log_artifact(self.run_id, str(path), event["folder"] or None)

    def _send_status(self, event: dict[str, Any]) -> None:
        if event["status"] == "RUNNING":
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            self._client.set_terminated(self.run_id, event["status"], end_time=event["time"])

    def _send_child(self, event: dict[str, Any]) -> None:
        """An evaluation or a member as a child of the run, found again by a uid of its own."""
        uid = f"{self._uid}/{event['name']}/{event['step']}"
        name = f"{self._folder.name} {event['name']} @{event['step']}"
        child = self._find(uid)
        if child is None:
            child = self._create(name, uid, event["time"], {"mlflow.parentRunId": self.run_id})
        else:
            self._client.update_run(child, name=name)  # without what `_send_resumed` may have appended
        self._log_tags(child, event["tags"])
        history = ({**point, "time": event["time"]} for point in event.get("history", ()))
        own = event["name"] == "evaluation"  # by the training itself
        model = self._models.of_step(event["step"], event["tags"]) if own else None
        self._log_points(child, [event, *history], model)
        self._client.set_terminated(child, "FINISHED", end_time=event["time"])

    def _send_checkpoint(self, event: dict[str, Any]) -> None:
        """Results of a checkpoint: points of the run at its step, and metrics of its model."""
        self._log_points(self.run_id, [event], self._models.of_step(event["step"], event["tags"]))

    def _send_resumed(self, event: dict[str, Any]) -> None:
        """Points cannot be removed in MLflow: what is logged again comes later and counts as the newer. The
        evaluations of weights that were given up say so in their names, until they are made again."""
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(event["time"] / 1000))
        said = f"values of later steps that were logged before {when} are those of weights that were given up"
        self._log_tags(self.run_id, {f"resumed_after_step_{event['step']}": said})
        query = f"tags.`mlflow.parentRunId` = '{self.run_id}'"
        for child in self._client.search_runs([self._experiment], query, max_results=MOST_CHILDREN):
            step = child.data.tags.get(UID_TAG, "").rpartition("/")[2]
            if step.isdigit() and int(step) > event["step"] and not child.info.run_name.endswith(GIVEN_UP):
                self._client.update_run(child.info.run_id, name=child.info.run_name + GIVEN_UP)
        self._models.give_up(event["step"])


def cut(text: str, longest: int) -> str:
    """`text`, with its end replaced by an ellipsis if it is longer than `longest` characters."""
    return text if len(text) <= longest else text[: longest - 1] + "\u2026"


@contextlib.contextmanager
def _complete_database(mlflow: Any, uri: str) -> Iterator[None]:
    """One process at a time creates the tables of a SQLite file: MLflow's migrations fail if two do."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as file:
        lock(file.fileno(), file.name, wait=True)
        if not path.exists():
            _create_database(mlflow, path)
        yield


def _create_database(mlflow: Any, path: Path) -> None:
    """Create MLflow's tables in another file and rename it: if a kill interrupts their creation (seconds), MLflow can
    never open that file again."""
    aside = path.with_name(f"{path.name}.new")
    for suffix in ("", "-journal", "-wal", "-shm"):
        Path(f"{aside}{suffix}").unlink(missing_ok=True)
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{aside}").search_experiments(max_results=1)
    os.replace(aside, path)


def _pieces(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _user() -> str:
    with contextlib.suppress(KeyError, OSError, ImportError):  # no entry for this uid, as in some containers
        return getpass.getuser()
    return "unknown"
