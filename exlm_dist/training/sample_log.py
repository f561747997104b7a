"""Which samples each step saw, written by the ranks that saw them (`tracking.samples`): proof, not bookkeeping.

`samples/rank-00000.jsonl` in the run folder has one line per step that the data-parallel rank completed, written by one
rank of each replica; a step that is run again after a restart is written again. Files are appended to and never read
while training.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from exlm_dist.training.step import StepResult
from exlm_dist.utils.errors import DataError

FOLDER = "samples"


class SampleLog:
    """Appends the sample ids of this data-parallel rank, of `world` ones, one line a step."""

    def __init__(self, run_folder: Path, rank: int, world: int, *, anew: bool = False) -> None:
        """`anew`: forget what earlier launches noted, as the run starts at step 0."""
        self._rank, self._world = rank, world
        folder = run_folder / FOLDER
        folder.mkdir(exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if anew else 0)
        self._handle = os.open(folder / f"rank-{rank:05d}.jsonl", flags, 0o644)
        size = os.fstat(self._handle).st_size
        if size and os.pread(self._handle, 1, size - 1) != b"\n":
            os.write(self._handle, b"\n")  # a kill tore the last line

    def write(self, result: StepResult) -> None:
        """Note one completed step."""
        ids = np.concatenate(result.sample_ids).tolist()
        line = {"step": result.step, "rank": self._rank, "world": self._world, "ids": ids}
        os.write(self._handle, json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


def samples_of_steps(run_folder: Path) -> dict[int, list[int]]:
    """Sorted sample ids of each step (0-based) that all ranks of some launch completed.

    DataError when two launches saw different samples in one step.
    """
    parts: dict[tuple[int, int], dict[int, list[int]]] = {}
    for path in sorted((run_folder / FOLDER).glob("rank-*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # torn by a kill; the step was run again
            ranks = parts.setdefault((entry["step"], entry["world"]), {})
            if ranks.setdefault(entry["rank"], entry["ids"]) != entry["ids"]:
                raise DataError(f"{path}: step {entry['step']} saw other samples when it was run again")
    steps: dict[int, list[int]] = {}
    for (step, world), ranks in sorted(parts.items()):
        if len(ranks) == world:
            seen = sorted(sum(ranks.values(), []))
            if steps.setdefault(step, seen) != seen:
                raise DataError(f"{run_folder}: step {step} saw other samples on {world} ranks")
    return steps
