"""Which settings of a run may change once it has begun. All others decide what is computed, and stay."""

from __future__ import annotations

from collections.abc import Iterable

#: Settings that may change when a run is resumed: they decide where and how fast, not what is computed.
RESUMABLE = (
    "runs",
    "budget",
    "data.path",
    "data.sources.NAME.path",
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
    """Whether a dotted key is one of `names`, or in a section of these. NAME stands for the name of any source."""
    return any(_is_in(key.split("."), name.split(".")) for name in names)


def _is_in(key: list[str], section: list[str]) -> bool:
    return len(key) >= len(section) and all(wanted in (part, "NAME") for part, wanted in zip(key, section))
