"""Metrics of a run: appended to `events.jsonl` by the training, sent to MLflow by a thread of its own.

The training thread only appends lines; a tracking server that is slow, down or hung costs it nothing, and no point.
Sending a line twice changes nothing (points carry the time of the line, and MLflow keeps one row for equal key, step,
time and value), so the position reached may be lost at any moment. `store.py` is the only importer of mlflow.
"""

from exlm_dist.tracking.events import EVENTS, EventLog, read_events
from exlm_dist.tracking.shipping import SyncReport, Tracker, sync
from exlm_dist.tracking.uri import redact, tracking_uri

__all__ = ["EVENTS", "EventLog", "SyncReport", "Tracker", "read_events", "redact", "sync", "tracking_uri"]
