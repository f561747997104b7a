"""The curves of a run, read from its `events.jsonl` alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exlm_dist.config import RunConfig, load_stored
from exlm_dist.tracking import EVENTS, read_events
from exlm_dist.utils.errors import CheckpointError


@dataclass(frozen=True)
class Series:
    """One metric: steps ascending, values, and the clock (seconds since 1970) at which each was logged."""

    steps: np.ndarray
    values: np.ndarray
    clock: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    def at(self, where: float, axis: np.ndarray) -> float:
        """Value at `where` on `axis` (same length as the series), linearly interpolated; nan outside it."""
        if not len(self) or not axis[0] - 1e-9 <= where <= axis[-1] + 1e-9:
            return float("nan")
        return float(np.interp(where, axis, self.values))


@dataclass(frozen=True)
class History:
    """Settings and curves of one run."""

    folder: Path
    config: RunConfig
    metrics: dict[str, Series]

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.config.name

    @property
    def budget(self) -> str:
        """Budget label; says so if there is none."""
        return self.config.budget or "budget not labelled"

    @property
    def kind(self) -> str:
        """`ExLM k=4` or `MLM`."""
        return f"ExLM k={self.config.model.states}" if self.config.model.objective == "exlm" else "MLM"

    def series(self, name: str) -> Series:
        """The metric `name`; an empty series if it was never logged."""
        empty = np.zeros(0)
        return self.metrics.get(name, Series(empty, empty, empty))

    def seconds(self, steps: np.ndarray) -> np.ndarray:
        """Training time at `steps`, over all restarts; nan where not logged."""
        return self.progress("seconds", steps)

    def progress(self, name: str, steps: np.ndarray) -> np.ndarray:
        """Seconds, sequences or tokens at `steps` from `progress/NAME` (0 at step 0); nan where not logged."""
        progress = self.series(f"progress/{name}")
        if not len(progress):
            return np.full(len(steps), np.nan)
        return np.interp(steps, np.append(0, progress.steps), np.append(0, progress.values), right=np.nan)

    @property
    def last_step(self) -> int:
        """Last step at which training or evaluation logged anything."""
        return int(max((s.steps[-1] for name, s in self.metrics.items() if not name.startswith("system/")), default=0))


def read_history(run_folder: Path) -> History:
    """History of the run in `run_folder`; CheckpointError if it contains none."""
    run_folder = Path(run_folder)
    for name in (EVENTS, "config.yaml"):
        if not (run_folder / name).is_file():
            raise CheckpointError(
                f"{run_folder} is no run folder: it has no {name}. Give the folder of a run, say runs/NAME."
            )
    points: dict[str, list[tuple[int, float, float]]] = {}
    for event in read_events(run_folder / EVENTS):
        if event["kind"] == "metrics":
            for name, value in event["values"].items():
                points.setdefault(name, []).append((event["step"], value, event["time"] / 1000))
    return History(
        run_folder, load_stored(run_folder / "config.yaml"), {name: _series(rows) for name, rows in points.items()}
    )


def _series(rows: list[tuple[int, float, float]]) -> Series:
    steps, values, clock = (np.array(column) for column in zip(*sorted(rows)))
    return Series(steps, values, clock)
