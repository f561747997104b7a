"""One logger for the package: time, rank, message; plain lines that read well in a Slurm log."""

from __future__ import annotations

import logging
import os
import sys


def get_logger(name: str) -> logging.Logger:
    """Logger of one module of the package."""
    return logging.getLogger(name)


def configure_logging(level: str | None = None) -> None:
    """Log to standard error: INFO on rank 0, WARNING on the others, unless `level` or else `EXLM_LOG` is given."""
    rank = int(os.environ.get("RANK", "0"))
    chosen = level or os.environ.get("EXLM_LOG") or ("INFO" if rank == 0 else "WARNING")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s [{rank}] %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("exlm_dist")
    logger.handlers[:] = [handler]
    logger.setLevel(chosen.upper())
    logger.propagate = False
