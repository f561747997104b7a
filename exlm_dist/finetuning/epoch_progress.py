"""What a fine-tuning shows while it runs: a bar for each epoch on a terminal, elsewhere a line of the log."""

from __future__ import annotations

import sys
from typing import Any

from exlm_dist.utils.logs import get_logger

_log = get_logger(__name__)


class EpochProgress:
    """Follows one member; `metric` is shown of each epoch."""

    def __init__(self, member: str, epochs: int, metric: str) -> None:
        self._member, self._epochs, self._metric = member, epochs, metric
        self._bar: Any = None
        self._best = ""

    def batch(self, epoch: int, batches: int, loss: float) -> None:
        """A batch of `batches` is done; its loss per label."""
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=batches, desc=f"{self._member} epoch {epoch}/{self._epochs}", unit=" batches", leave=False
            )
        self._bar.set_postfix_str(f"loss {loss:.4f}{self._best}", refresh=False)
        self._bar.update()

    def epoch(self, record: dict[str, Any], best_epoch: int) -> None:
        """An epoch is done."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        value = record["valid"][self._metric]
        mark = "best so far" if best_epoch == record["epoch"] else f"best: epoch {best_epoch}"
        self._best = f", valid {self._metric} {value:.4f} ({mark})"
        _log.info(
            "%s epoch %d/%d: train loss %.4f, valid loss %.4f, valid %s %.4f (%s), %.1f s",
            self._member,
            record["epoch"],
            self._epochs,
            record["train_loss"],
            record["valid_loss"],
            self._metric,
            value,
            mark,
            record["seconds"],
        )
