"""Progress of a long step: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time

from exlm_dist.utils.logs import get_logger

_log = get_logger(__name__)
SECONDS = 5.0


class Progress:
    """Counts `unit`s of the step `label`; `total` where it is known. Used as a context manager."""

    def __init__(self, label: str, unit: str, total: int | None = None):
        self._label, self._unit, self._total = label, unit, total
        self._count = 0
        self._start = self._said = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, unit=f" {unit}", leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        self._say("done")

    def update(self, count: int) -> None:
        """`count` more are done."""
        self._count += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._said >= SECONDS:
            self._said = time.monotonic()
            self._say("so far")

    def _say(self, when: str) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        of = f" of {self._total:,}" if self._total else ""
        _log.info(
            "%s: %s%s %s %s, %s/s",
            self._label,
            f"{self._count:,}",
            of,
            self._unit,
            when,
            f"{self._count / seconds:,.0f}",
        )
