"""Load of this node as ordinary metrics, under the names that MLflow's "System metrics" tab shows."""

from __future__ import annotations

import os
import sys
from threading import Event, Thread

import psutil

from exlm_dist.tracking.events import EventLog
from exlm_dist.utils.logs import get_logger

logger = get_logger(__name__)


def system_metrics(folder: str | os.PathLike[str] = ".") -> dict[str, float]:
    """CPU, memory, the disk of `folder` and each CUDA device, now; in percent and megabytes (1e6 bytes)."""
    memory = psutil.virtual_memory()
    values = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
        "process_memory_megabytes": psutil.Process().memory_info().rss / 1e6,
        "disk_available_megabytes": psutil.disk_usage(os.fspath(folder)).free / 1e6,
        **_gpu_metrics(),
    }
    return {f"system/{name}": value for name, value in values.items()}


def _gpu_metrics() -> dict[str, float]:
    """Only if torch is loaded and has a CUDA context: sampling must not create one. From NVML, which needs none; where
    that is missing, of the devices on which this process has memory."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    values = {}
    for device in range(torch.cuda.device_count()):
        try:
            used, total = torch.cuda.device_memory_used(device), torch.cuda.get_device_properties(device).total_memory
            values[f"gpu_{device}_utilization_percentage"] = torch.cuda.utilization(device)
        except (
            ImportError,
            AttributeError,
            RuntimeError,
        ):  # no NVML, or no Python binding of it
            if not torch.cuda.memory_reserved(device):
                continue  # asking CUDA would open a context of half a gigabyte there
            free, total = torch.cuda.mem_get_info(device)
            used = total - free
        values[f"gpu_{device}_memory_usage_megabytes"] = used / 1e6
        values[f"gpu_{device}_memory_usage_percentage"] = 100 * used / total
    return values


class SystemSampler:
    """Logs `system_metrics` every `interval` seconds from a daemon thread; its step continues over restarts."""

    def __init__(self, log: EventLog, interval: float = 10.0) -> None:
        self._log, self._interval = log, interval
        self._stop = Event()
        self._thread = Thread(target=self._run, name="system-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        step = 1 + (self._log.last_step("system/cpu_utilization_percentage") or 0)
        psutil.cpu_percent()  # the first call only starts the measurement
        while not self._stop.wait(self._interval):
            try:
                self._log.metrics(step, system_metrics(self._log.path.parent))
            except (psutil.Error, OSError, RuntimeError) as error:
                logger.warning("no system metrics: %s", error)
                return
            step += 1
