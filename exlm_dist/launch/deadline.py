"""When the time of this job is up. No torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping

from exlm_dist.utils.logs import get_logger

#: Seconds within which Slurm's commands must answer; a controller under load is slow.
PATIENCE = 20.0
logger = get_logger(__name__)


def end_of_job(time_limit: float, environment: Mapping[str, str] = os.environ) -> float | None:
    """Unix time at which the job will be ended from outside; None if unknown.

    The earlier of `time_limit` (minutes from now, 0: none) and what Slurm says: SLURM_JOB_END_TIME, else `squeue`, else
    `scontrol`.
    """
    ends = [time.time() + 60 * time_limit] if time_limit else []
    if (job := environment.get("SLURM_JOB_ID")) is not None:
        said = environment.get("SLURM_JOB_END_TIME", "")
        end = float(said) if said.isdigit() else _ask_slurm(job)
        ends += [end] if end is not None else []
    return min(ends, default=None)


def _ask_slurm(job: str) -> float | None:
    for command in (
        ["squeue", "--noheader", "--jobs", job, "--format=%e"],
        ["scontrol", "--oneliner", "show", "job", job],
    ):
        if shutil.which(command[0]) is None:
            continue
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            logger.warning("%s did not answer within %g s", command[0], PATIENCE)
            continue
        if answer.returncode == 0:
            return _parse(answer.stdout)
        logger.warning("%s: %s", command[0], answer.stderr.strip())
    logger.warning(
        "Slurm does not say when job %s ends. Set launch.time_limit, so that the run saves before that.", job
    )
    return None


def _parse(answer: str) -> float | None:
    """Unix time in an answer of squeue (2026-11-24T07:00:00) or scontrol (EndTime=...); None for an unlimited job."""
    words = [word.removeprefix("EndTime=") for word in answer.split() if "=" not in word or word.startswith("EndTime=")]
    for word in words:
        try:
            return time.mktime(time.strptime(word, "%Y-%m-%dT%H:%M:%S"))
        except ValueError:
            continue  # another field; N/A or Unknown if there is no limit
    return None
