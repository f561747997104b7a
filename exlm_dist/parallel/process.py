"""One rank of a job: who it is, how it joins the others, and small collectives on the CPU by which all ranks agree.

Every collective has the timeout `launch.timeout`. The environment is that of torchrun, DeepSpeed, our own supervisor
and `srun` scripts: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; without RANK the process is alone.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from exlm_dist.config.schema import LaunchConfig, ParallelConfig
from exlm_dist.kernels.determinism import compute_repeatably
from exlm_dist.parallel import devices
from exlm_dist.parallel.agreement import any_of
from exlm_dist.parallel.compiler import compile_on_this_node, leave_compiler_unloaded
from exlm_dist.parallel.layout import Layout
from exlm_dist.parallel.network import interface_towards
from exlm_dist.parallel.process_groups import Grid
from exlm_dist.utils import errors
from exlm_dist.utils.cores import available_cores
from exlm_dist.utils.errors import EXIT_RETRY, ConfigError, UserError

Result = TypeVar("Result")
#: DeepSpeed makes process groups without a timeout, which would get torch's default: up to half an hour.
_new_group = dist.new_group


class PeerLost(UserError):
    """Another rank ended, or did not answer in time: the job can only be started again."""

    exit_code = EXIT_RETRY


@dataclass(frozen=True)
class Process:
    """This rank. `control` is a CPU process group for decisions, so that agreeing never waits for a GPU; `grid` says
    which part of the model and of the batch is this rank's."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    control: Any
    grid: Grid

    @property
    def is_first(self) -> bool:
        """Rank 0 alone writes to the run folder."""
        return self.rank == 0

    def all_gather(self, values: list[float]) -> torch.Tensor:
        """`values` of every rank, [world, n] in fp64. All ranks must call it, with the same number of values."""
        mine = torch.tensor(values, dtype=torch.float64)
        every = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(every, mine, group=self.control)
        return torch.stack(every)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on at least one rank. A collective."""
        return any_of(flag, self.rank, self.world, self.control)

    def all_gather_object(self, value: Any) -> list[Any]:
        """`value` of every rank, on every rank, in the order of the ranks. Sent as JSON: never a pickle."""
        content = json.dumps(value).encode()
        sizes = self.all_gather([len(content)])[:, 0].long().tolist()
        mine = torch.frombuffer(bytearray(content.ljust(max(sizes))), dtype=torch.uint8)
        every = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(every, mine, group=self.control)
        return [json.loads(data.numpy().tobytes()) for data in every]

    def broadcast_object(self, value: Any) -> Any:
        """`value` of rank 0, on every rank. Sent as JSON: never a pickle."""
        content = json.dumps(value).encode() if self.is_first else b""
        size = torch.tensor([len(content)])
        dist.broadcast(size, 0, group=self.control)
        data = torch.frombuffer(bytearray(content.ljust(int(size), b" ") or b" "), dtype=torch.uint8)
        dist.broadcast(data, 0, group=self.control)
        return json.loads(bytes(data.tolist()))

    def run_on_first_rank(self, work: Callable[[], Result]) -> Result:
        """Run `work` on rank 0 and broadcast its result (JSON); a UserError there is raised on every rank."""
        outcome: dict[str, Any] = {}
        if self.is_first:
            try:
                outcome = {"result": work()}
            except UserError as error:
                known = next(kind.__name__ for kind in type(error).__mro__ if hasattr(errors, kind.__name__))
                outcome = {"error": known, "message": str(error)}
        outcome = self.broadcast_object(outcome)
        if "error" in outcome:
            raise getattr(errors, outcome["error"])(outcome["message"])
        return outcome["result"]

    def run_everywhere(self, work: Callable[[], Result]) -> Result:
        """Run `work` (no communication inside) on every rank; where it raises a UserError, all ranks end with one."""
        failure: UserError | None = None
        try:
            result = work()
        except UserError as error:
            failure = error
        ranks = [rank for rank, failed in enumerate(self.all_gather([float(failure is not None)])[:, 0]) if failed]
        if failure is not None:
            raise failure
        if ranks:
            raise PeerLost(f"rank {ranks[0]} ended with an error; see its message.")
        return result


def start(launch: LaunchConfig, parallel: ParallelConfig | None = None) -> Process:
    """Join the process group of the job and make those of the layout.

    ConfigError for a layout that does not fit the ranks, devices that are missing or differ in kind, or a
    rendezvous address that is missing or in use; PeerLost if not all ranks meet in time.
    """
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)
    rank, world, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    parallel = parallel or ParallelConfig()
    layout = Layout.of(parallel, world)
    if takes_one_connection(parallel) and launch.device != "cpu":  # read when CUDA starts
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device, found = _find_device(launch.device, local_rank, alone=world == 1)
    # Left to pick its accelerator itself, DeepSpeed warns, and on a GPU machine it ignores `launch.device: cpu`.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    torch.set_num_threads(threads(launch.threads, local_world(world)))
    if device.type == "cuda":
        compute_repeatably()
        if world > local_world(world):
            compile_on_this_node()
    timeout = timedelta(seconds=launch.timeout)
    _join("nccl" if device.type == "cuda" else "gloo", rank, world, timeout, found)
    if device.type == "cpu":  # where a second of a core counts, and every layout is tested without it
        leave_compiler_unloaded()
    dist.new_group = functools.partial(_new_group, timeout=timeout)
    control = dist.new_group(backend="gloo") if device.type == "cuda" else dist.group.WORLD
    return Process(rank, world, local_rank, device, control, Grid.make(layout, rank))


def takes_one_connection(parallel: ParallelConfig) -> bool:
    """Whether kernels must start in the order of their launches: in the backward pass of a tensor-parallel layer
    megatron launches a collective just before the product that is to hide it. At ZeRO 3 that order would keep the
    gathering of weights from running beside anything."""
    return parallel.tensor > 1 and parallel.zero < 3


def _find_device(wanted: str, local_rank: int, *, alone: bool) -> tuple[torch.device, devices.Found]:
    """The device of this rank, made the current one, and what the others are told of it. ConfigError, or what CUDA
    raises, if there is none that works and nobody to tell."""
    try:
        device = devices.choose_device(wanted, local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device, devices.look(device)
    except (ConfigError, RuntimeError) as error:
        if alone:
            raise
        why = str(error) if isinstance(error, ConfigError) else f"its GPU cannot be used: {str(error).splitlines()[0]}"
        return torch.device("cpu"), devices.look(None, why)


def _join(backend: str, rank: int, world: int, timeout: timedelta, found: devices.Found) -> None:
    if world == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        raise ConfigError(
            f"WORLD_SIZE is {world} but MASTER_ADDR or MASTER_PORT is not set. Start the ranks with a launcher "
            "(launchers/deepspeed.sh, or launch.processes for local ones)."
        )
    if interface := interface_towards(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    try:
        store, *_ = next(dist.rendezvous("env://", rank, world, timeout=timeout))
        store.set_timeout(timeout)
        devices.agree(store, rank, world, found)
        store = dist.PrefixStore("default_pg", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            if errors.CHOSEN_PORT in os.environ:
                raise PeerLost(
                    f"port {port} on {address} is in use by another program; the next attempt takes another."
                ) from error
            raise ConfigError(
                f"port {port} on {address} is in use by another program. Set MASTER_PORT to a free one."
            ) from error
        raise PeerLost(
            f"rank {rank} could not meet the others at {address}:{port} within {timeout.total_seconds():.0f} s "
            f"(launch.timeout): {str(error).splitlines()[0]}"
        ) from error
    except dist.DistStoreError as error:
        raise PeerLost(
            f"rank {rank}: not all {world} ranks came to {address}:{port} within {timeout.total_seconds():.0f} s "
            f"(launch.timeout). Look for the one that did not start."
        ) from error


def finish() -> None:
    """Leave the group after a barrier: without one gloo ranks often abort at exit."""
    if dist.is_initialized():
        if dist.get_world_size() > 1:
            dist.barrier()
        leave()


def leave() -> None:
    """Leave the group without waiting for the others, so that they notice at once: for ending on an error."""
    dist.new_group = _new_group
    if dist.is_initialized():
        dist.destroy_process_group()


def must_exit_hard() -> bool:
    """Whether only the end of this process frees the others: an NCCL group with pending work cannot be left."""
    return dist.is_initialized() and dist.get_world_size() > 1 and dist.get_backend() == "nccl"


def lost_peer(error: BaseException) -> bool:
    """Whether `error` is what torch raises from a collective when a peer is gone or does not answer."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    text = str(error)
    signs = (
        "gloo",
        "Connection closed by peer",
        "Application timeout",
        "Connection reset by peer",
        "Broken pipe",
        "Timed out waiting",
        "NCCL",
    )
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def local_world(world: int) -> int:
    """Ranks on this node: LOCAL_WORLD_SIZE (torchrun), LOCAL_SIZE (DeepSpeed), else all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world)


def node_part(local_rank: int) -> tuple[int, int]:
    """(number of this rank, number of ranks) among those of its node, for work that they divide. (0, 1), all of it,
    where the launcher does not say how many they are."""
    known = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return (local_rank, int(known)) if known else (0, 1)


def threads(wanted: int, processes: int) -> int:
    """CPU threads of this process: `wanted`, else OMP_NUM_THREADS, else an equal split of the cores of this job."""
    if wanted:
        return wanted
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    return max(1, available_cores() // max(1, processes))
