"""The cores that this process may use: those that it is bound to, and no more than its control group has time on."""

from __future__ import annotations

import math
import os
from pathlib import Path

_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_cores() -> int:
    """At least 1. Containers and Slurm jobs often have fewer than the machine."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(_GROUPS, _OWN)
    return bound if quota is None else max(1, min(bound, math.ceil(quota)))


def cpu_quota(groups: Path, own: Path) -> float | None:
    """Cores' worth of time that the control group of this process and those around it give; None: no limit, or none
    that can be read. groups: where control groups are mounted; own: the file that says which are this process's."""
    limits: list[float] = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = groups / "cpu" if controllers else groups
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            limits += _limit_of(folder)
            if folder == root:
                break
    return min(limits, default=None)


def _limit_of(folder: Path) -> list[float]:
    """The limit of one group, of version 2 (cpu.max: quota and period) or 1; empty if there is none."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return [int(quota) / int(period)] if quota not in ("max", "-1") else []
    except (OSError, ValueError):
        return []
