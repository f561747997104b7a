"""Results written to the event logs of the runs that their checkpoints are of, and from there sent to MLflow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from exlm_dist.checkpoint.reader import read_config
from exlm_dist.suites.suite_table import Column
from exlm_dist.tracking import EVENTS, EventLog, redact, sync
from exlm_dist.utils.errors import UserError
from exlm_dist.utils.logs import get_logger

#: Seconds that MLflow gets to take the results of a run; they stay in its folder anyway.
TRACKING_PATIENCE = 30.0
logger = get_logger(__name__)


def write_to_runs(columns: Iterable[Column], write: Callable[[EventLog, str], None]) -> None:
    """Have `write` log what there is of each run folder in the columns, and send it to MLflow where the settings of the
    run say so. A failure is a warning: the results are in the folder of the evaluation already."""
    for run in sorted({column.run for column in columns if column.run is not None}):
        folder = Path(run)
        if not (folder / EVENTS).is_file():
            continue
        try:
            log = EventLog(folder / EVENTS)
            try:
                write(log, run)
            finally:
                log.close()
            if read_config(folder).tracking.mlflow:
                sync(folder, timeout=TRACKING_PATIENCE)
        except (UserError, OSError) as error:
            logger.warning("%s: the evaluation is not recorded in MLflow (%s)", run, redact(str(error)))
