"""Whether the ranks of a run are started again in place: at once, but never for ever. Never imports torch.

The supervisors ask it in their loop; a batch script asks through `exlm restart`, with the count kept in the run folder.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from exlm_dist.utils.errors import EXIT_DONE, EXIT_RETRY, EXIT_STOP
from exlm_dist.utils.files import write_json
from exlm_dist.utils.logs import get_logger

#: A shell and Slurm report a process that a signal ended as 128 + the signal; DeepSpeed's launcher as 256 - the signal.
KILLED = 128
STATE_FILE = "restarts.json"
_STEP_FOLDER = re.compile(r"step-(\d+)$")
logger = get_logger(__name__)


def newest_step(run_folder: Path) -> int:
    """Step of the newest checkpoint of a run that was written to its end; 0 when there is none."""
    found = (_STEP_FOLDER.search(path.parent.name) for path in (run_folder / "checkpoints").glob("step-*/COMPLETE"))
    return max((int(match.group(1)) for match in found if match), default=0)


def may_be_retried(code: int) -> bool:
    """Whether starting again may help: 76, or a rank that a signal killed."""
    return code == EXIT_RETRY or code < 0 or code > KILLED


def exit_code(code: int) -> int:
    """`code` by our own contract: a process that a signal killed counts as 76."""
    return EXIT_RETRY if may_be_retried(code) else code


@dataclass
class Restarts:
    """Counts the restarts of a run since its newest checkpoint last moved."""

    run_folder: Path
    limit: int
    step: int = 0
    count: int = 0

    @staticmethod
    def begin(run_folder: Path, limit: int) -> Restarts:
        """For a launch that begins now; `limit`: restarts in a row without a newer checkpoint, 0: none at all."""
        return Restarts(run_folder, limit, newest_step(run_folder))

    def next_code(self, code: int) -> int | None:
        """None: start the ranks again. Else what the run ends with, after its ranks ended with `code`.

        Where the newest checkpoint has not moved for `limit` restarts this is 78, and the reason is logged.
        """
        if not may_be_retried(code):
            return code
        if self.limit == 0:
            return EXIT_RETRY
        step = newest_step(self.run_folder)
        if step > self.step:
            self.step, self.count = step, 0
        if self.count == self.limit:
            logger.error(
                "%s: %d restarts (launch.restarts) since the checkpoint of step %d and none got to the next one. "
                "Starting again would meet the same end: see the messages above. Shorten checkpoint.every if single "
                "ranks die now and then; exclude a machine that is always the one.",
                self.run_folder, self.count, self.step,
            )
            return EXIT_STOP
        self.count += 1
        logger.warning(
            "%s: starting the ranks again after step %d (restart %d of %d without a newer checkpoint)",
            self.run_folder, step, self.count, self.limit,
        )
        return None


def decide(run_folder: Path, limit: int, code: int, *, fresh: bool) -> int:
    """For a batch script whose ranks ended with `code` (not 0). 0: start them again; else what to end with.

    The count lives in `restarts.json` of the run folder, so that it goes on over requeues; `fresh`: begin at none.
    """
    file = run_folder / STATE_FILE
    known = json.loads(file.read_text()) if file.exists() and not fresh else {}
    restarts = Restarts(run_folder, limit, **known)
    answer = restarts.next_code(code)
    if run_folder.is_dir():
        write_json(file, {"step": restarts.step, "count": restarts.count})
    return EXIT_DONE if answer is None else answer
