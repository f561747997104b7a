"""Whether the ranks of a run are restarted in place: at once, but not for ever. No torch.

(The batch script of `exlm_dist.launch.slurm_scripts` has the same rule in bash: its node may have no Python.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exlm_dist.config.schema import RunConfig
from exlm_dist.utils.checkpoint_names import newest_step
from exlm_dist.utils.errors import EXIT_RETRY, EXIT_STOP
from exlm_dist.utils.logs import get_logger

#: A shell and Slurm report a process killed by a signal as 128 + the signal, DeepSpeed's launcher as 256 - the signal.
KILLED = 128
logger = get_logger(__name__)


def may_be_retried(code: int) -> bool:
    """Whether a restart may help: 76, or a rank killed by a signal."""
    return code == EXIT_RETRY or code < 0 or code > KILLED


def exit_code(code: int) -> int:
    """`code` by our own contract: a process killed by a signal counts as 76."""
    return EXIT_RETRY if may_be_retried(code) else code


@dataclass
class Restarts:
    """Counts the restarts of a run since its newest checkpoint.

    `limit`: restarts in a row without a newer checkpoint, 0: none at all; `step`: of that checkpoint.
    """

    run_folder: Path
    limit: int
    step: int = 0
    count: int = 0

    @staticmethod
    def begin(config: RunConfig) -> Restarts:
        """For a launch that starts now."""
        run_folder = Path(config.runs) / config.name
        return Restarts(run_folder, config.launch.restarts, newest_step(run_folder))

    def next_code(self, code: int) -> int | None:
        """After the ranks ended with `code`: None to restart them, else the exit code of the run.

        That is 78, with the reason logged, after `limit` restarts without a newer checkpoint.
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
                "%s: %d restarts (launch.restarts) since the checkpoint of step %d, and none reached the next one. "
                "Another restart would end in the same way: see the messages above. Shorten checkpoint.every if ranks "
                "die now and then; exclude a node that it always happens on.",
                self.run_folder,
                self.count,
                self.step,
            )
            return EXIT_STOP
        self.count += 1
        logger.warning(
            "%s: restarting the ranks after step %d (restart %d of %d without a newer checkpoint)",
            self.run_folder,
            step,
            self.count,
            self.limit,
        )
        return None
