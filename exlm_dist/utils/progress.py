"""Progress of a long step: a bar on a terminal, elsewhere a log line every few seconds."""

from __future__ import annotations

import sys
import time

from exlm_dist.utils.logs import get_logger

_log = get_logger(__name__)
SECONDS = 5.0


class Progress:
    """Context manager that counts the `unit`s done of the step `label`, out of `total` if that is known."""

    def __init__(self, label: str, unit: str, total: int | None = None):
        self._label, self._unit, self._total = label, unit, total
        self._count = 0
        self._start = self._reported = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, unit=f" {unit}", leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        self._report("done")

    def update(self, count: int) -> None:
        """Count `count` more units as done."""
        self._count += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._reported >= SECONDS:
            self._reported = time.monotonic()
            self._report("so far")

    def _report(self, when: str) -> None:
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
