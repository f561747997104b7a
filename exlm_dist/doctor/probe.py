"""One rank of `exlm doctor`: joins the process group as a run does, computes, all-reduces, looks for shared files.

`python -m exlm_dist.doctor.probe REPORT DEVICE TIMEOUT`; rank 0 writes what every rank saw to REPORT, as JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from exlm_dist.config.schema import LaunchConfig
from exlm_dist.parallel import process as processes
from exlm_dist.parallel.process import Process
from exlm_dist.utils.errors import UserError
from exlm_dist.utils.files import write_atomic

#: Bytes of the all-reduce, and how often it is repeated.
BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
REPEATS = 5
#: Seconds within which a shared file system must show a file to another node.
PATIENCE = 15.0


def main(report: Path, device: str, timeout: int) -> None:
    """Take part in the checks as one rank, and write the report if this is rank 0."""
    process = processes.start(LaunchConfig(device=device, timeout=timeout))
    seen = {
        "rank": process.rank,
        "host": socket.gethostname(),
        "device": _device_name(process),
        "backend": dist.get_backend(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "numpy")},
        "computes": _computes(process.device),
        **_all_reduce(process),
        "unseen": _unseen_files(process, report),
        "clock": _clock(process),
    }
    ranks = process.all_gather_object(seen)
    if process.is_first:
        write_atomic(report, json.dumps(ranks))
    processes.finish()


def _device_name(process: Process) -> str:
    return torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else f"CPU {platform.machine()}"


def _computes(device: torch.device) -> bool:
    """Whether a product of integer-valued matrices is exact."""
    left = torch.arange(256 * 256, device=device, dtype=torch.float32).reshape(256, 256) % 7
    expected = (left.cpu().long() @ left.cpu().long().T).float()
    return torch.equal((left @ left.T).cpu(), expected)


def _all_reduce(process: Process) -> dict[str, Any]:
    size = BYTES[process.device.type]
    good, seconds = True, []
    for _ in range(REPEATS):
        values = torch.full((size // 4,), float(process.rank + 1), device=process.device)
        dist.barrier(group=process.control)
        begun = time.monotonic()
        dist.all_reduce(values)
        total = values[-1].item()  # synchronises with the device
        seconds.append(time.monotonic() - begun)
        good = good and total == process.world * (process.world + 1) / 2
    return {"reduced_bytes": size, "reduce_seconds": min(seconds), "reduced_well": good}


def _unseen_files(process: Process, report: Path) -> list[int]:
    """Of the first ranks of the other nodes, those whose file the first rank of this node does not see beside `report`.

    Collective: all ranks call it.
    """
    local_ranks = process.all_gather([float(process.local_rank)])[:, 0].tolist()
    if process.local_rank == 0:
        report.with_name(f"{report.name}.{process.rank}").touch()
    dist.barrier(group=process.control)
    missing = {rank for rank, local in enumerate(local_ranks) if local == 0 and process.local_rank == 0}
    deadline = time.monotonic() + PATIENCE
    while missing and time.monotonic() < deadline:
        missing = {rank for rank in missing if not report.with_name(f"{report.name}.{rank}").is_file()}
        if missing:
            time.sleep(0.2)
    return sorted(missing)


def _clock(process: Process) -> float:
    """Seconds by which the clock of this rank is ahead of rank 0's, to the precision of one exchange."""
    best = (float("inf"), 0.0)
    for _ in range(REPEATS):
        before = time.time()
        theirs = float(process.all_gather([time.time()])[0, 0])
        after = time.time()
        best = min(best, (after - before, (before + after) / 2 - theirs))
    return best[1]


if __name__ == "__main__":
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    try:
        main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    except UserError as error:
        print(f"[rank {os.environ.get('RANK', '0')}] error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)
    os._exit(0)
