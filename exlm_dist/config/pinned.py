"""Which settings of a run may change once it has begun. All others decide what is computed, and stay."""

from __future__ import annotations

from collections.abc import Iterable

#: Settings that may change when a run is resumed: they decide where and how fast, not what is computed.
RESUMABLE = (
    "runs",
    "budget",
    "data.path",
    "data.bucket",
    "data.prefetch",
    "data.workers",
    "data.max_bad_records",
    "batch.micro",
    "loss.max_invalid",
    "precision",
    "parallel",
    "kernels",
    "checkpoint",
    "evaluation",
    "tracking",
    "launch",
    "watchdog",
)
#: Settings that a run may change with `--allow-changes`: they decide how its next steps learn, not what it has learned.
CHANGEABLE = (
    "masking",
    "model.dropout",
    "model.attention_dropout",
    "loss.reduction",
    "optimizer",
    "schedule",
)


def is_among(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of `names`, or in a section of these."""
    return any(key == name or key.startswith(name + ".") for name in names)
