"""The device of each rank, and the agreement of all ranks on what they have, before any of them waits for a GPU."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from exlm_dist.utils.errors import ConfigError

#: Seconds for which the rank that has the store stays to let the others read that their devices do not fit.
PATIENCE = 10.0
_VERDICT = "exlm/devices"


@dataclass(frozen=True)
class Found:
    """What a rank has found on its node. `error`: why it has no device, else empty; `gpu`: which one, by a name that is
    the same in every process of the node, empty on a CPU."""

    host: str
    gpu: str
    error: str = ""


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """Device of this rank; ConfigError if CUDA is requested but absent, has too few devices, or is absent though Slurm
    has given the job GPUs. Where only one GPU is seen it is this rank's: Slurm may show each task its own alone."""
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        given = os.environ.get("SLURM_GPUS_ON_NODE", "0")
        if wanted == "auto" and given == "0":
            return torch.device("cpu")
        what = "launch.device is cuda" if wanted == "cuda" else f"Slurm has given {given} GPUs of this node to the job"
        raise ConfigError(
            f"{what}, but torch sees no CUDA device. Look at the driver (nvidia-smi) and at what the container is "
            "started with (apptainer: --nv); launch.device cpu trains without GPUs."
        )
    count = torch.cuda.device_count()
    if count == 1:
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this machine has {count}. Start at most {count} processes here."
        )
    return torch.device("cuda", local_rank)


def look(device: torch.device | None, error: str = "") -> Found:
    """What this rank tells the others of its device, or of the `error` for which it has none."""
    gpu = ""
    if device is not None and device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        gpu = str(getattr(about, "uuid", "")) or f"{os.environ.get('CUDA_VISIBLE_DEVICES', '')}/{device.index}"
    return Found(os.environ.get("SLURMD_NODENAME") or socket.gethostname(), gpu, error)


def agree(store: dist.Store, rank: int, world: int, mine: Found) -> None:
    """Compare what all ranks have found, over a store that they have in common; ConfigError, the same on every rank,
    where they cannot train as one job. The first rank reads them all, the others what it says."""
    store.set(f"{_VERDICT}/{rank}", json.dumps(asdict(mine)))
    if rank == 0:
        every = store.multi_get([f"{_VERDICT}/{other}" for other in range(world)])
        store.set(_VERDICT, judge([Found(**json.loads(one)) for one in every]))
    if not (verdict := store.get(_VERDICT).decode()):
        return
    store.set(f"{_VERDICT}/{rank}/read", "")
    if rank == 0:
        with contextlib.suppress(dist.DistStoreError):
            store.wait([f"{_VERDICT}/{other}/read" for other in range(world)], timedelta(seconds=PATIENCE))
    raise ConfigError(verdict)


def judge(ranks: Sequence[Found]) -> str:
    """Why these ranks cannot train as one job; empty if they can."""
    for rank, found in enumerate(ranks):
        if found.error:
            return f"rank {rank} on {found.host}: {found.error}"
    without = [found.host for found in ranks if not found.gpu]
    if 0 < len(without) < len(ranks):
        hosts = list(dict.fromkeys(without))
        return (
            f"{len(without)} of {len(ranks)} ranks see no GPU, those on {', '.join(hosts)}, and the others do. Look at "
            f"the driver there (nvidia-smi), or leave out the nodes (sbatch --exclude={','.join(hosts)}); "
            "launch.device cpu trains without GPUs."
        )
    owners: dict[tuple[str, str], int] = {}
    for rank, found in enumerate(ranks):
        other = owners.setdefault((found.host, found.gpu), rank)
        if found.gpu and other != rank:
            return (
                f"ranks {other} and {rank} on {found.host} have the same GPU ({found.gpu}). Start as many ranks on a "
                "node as it has GPUs, or show each task its own (srun --gpus-per-task=1)."
            )
    return ""
