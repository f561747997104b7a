"""Metrics of a run: the training thread appends them to `events.jsonl`, another thread sends them to MLflow.

Training only appends lines: a tracking server that is slow, down or hung costs it no time and loses no point. Sending a
line twice changes nothing (points carry the time of their line, and MLflow keeps one row for equal key, step, time and
value), so the position reached may be lost at any moment. Only `store.py` imports mlflow.
"""

from exlm_dist.tracking.events import CHANGES, EVENTS, EventLog, read_events
from exlm_dist.tracking.shipping import SyncReport, Tracker, sync
from exlm_dist.tracking.uri import redact, tracking_uri

__all__ = ["CHANGES", "EVENTS", "EventLog", "SyncReport", "Tracker", "read_events", "redact", "sync", "tracking_uri"]
