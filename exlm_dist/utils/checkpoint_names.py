"""Names of the checkpoints in a run folder: what a launcher, which reads none of them, needs to count them."""

from __future__ import annotations

import re
from pathlib import Path

CHECKPOINTS = "checkpoints"
#: The last file to be written: a checkpoint without it is not whole.
COMPLETE_FILE = "COMPLETE"
_STEP_FOLDER = re.compile(r"step-(\d+)")


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """`checkpoints/step-00001000` of a run."""
    return Path(run_folder) / CHECKPOINTS / f"step-{step:08d}"


def step_in_name(folder: Path) -> int | None:
    """Step in the name `step-00001000`; None for any other name."""
    match = _STEP_FOLDER.fullmatch(Path(folder).name)
    return None if match is None else int(match.group(1))


def newest_step(run_folder: Path) -> int:
    """Step of the newest complete checkpoint of a run; 0 if there is none."""
    complete = (Path(run_folder) / CHECKPOINTS).glob(f"step-*/{COMPLETE_FILE}")
    return max((step_in_name(path.parent) or 0 for path in complete), default=0)
