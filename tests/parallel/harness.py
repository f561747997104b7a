"""Runs a function in n real processes, with a timeout, and returns their results.

The processes are forked from a clean server that has imported torch and the package once: a start takes one second
instead of ten, and inherits nothing from the test process (threads, autograd, process groups). A function must be
importable: defined at the top level of a test module. Arguments and results are pickled: plain values and numpy arrays,
no tensors.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

from exlm_dist.launch.local import free_port

PRELOAD = [
    "torch",
    "deepspeed",
    "safetensors.torch",
    "exlm_dist.training.session",
    "exlm_dist.parallel.tensor",
    "exlm_dist.parallel.pipeline",
]
#: Seconds that the other ranks have to end by themselves once one has failed.
GRACE = 4.0


class RankFailed(AssertionError):
    """A rank raised, was killed, or did not end in time. `codes`: exit codes in the order of the ranks."""

    def __init__(self, message: str, codes: list[int | None]) -> None:
        super().__init__(message)
        self.codes = codes


def on_ranks(
    function: Callable[..., Any], world: int, *arguments: Any, timeout: float = 60.0, **keywords: Any
) -> list[Any]:
    """`function(process, *arguments)` on `world` gloo ranks of one process group; results in the order of the ranks.

    `process` is an `exlm_dist.parallel.process.Process`. RankFailed, with the tracebacks, unless all ranks succeed.
    """
    return run_processes(_joined, world, function, timeout, *arguments, timeout=timeout, **keywords)


def _joined(rank: int, function: Callable[..., Any], timeout: float, *arguments: Any) -> Any:
    from exlm_dist.config.schema import LaunchConfig
    from exlm_dist.parallel import process as processes

    process = processes.start(LaunchConfig(timeout=max(5, int(timeout)), device="cpu", threads=1))
    result = function(process, *arguments)
    processes.finish()
    return result


def run_processes(
    function: Callable[..., Any],
    world: int,
    *arguments: Any,
    timeout: float = 60.0,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """`function(rank, *arguments)` in `world` processes with a launcher's environment; the function joins the group."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = str(free_port())
    pipes, ranks = [], []
    for rank in range(world):
        receive, send = context.Pipe(duplex=False)
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": "lo",
            **(environment or {}),
        }
        process = context.Process(target=_child, args=(send, variables, function, rank, arguments), daemon=True)
        process.start()
        send.close()
        pipes.append(receive)
        ranks.append(process)
    try:
        return _results(ranks, pipes, timeout)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()


def _child(
    send: Connection, variables: Mapping[str, str], function: Callable[..., Any], rank: int, arguments: tuple
) -> None:
    os.environ.update(variables)
    import torch

    torch.set_num_threads(1)
    try:
        send.send((True, function(rank, *arguments)))
    except BaseException as error:
        send.send((False, traceback.format_exc()))
        send.close()
        os._exit(getattr(error, "exit_code", 1))


def _results(ranks: list, pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    open_pipes = dict(zip(pipes, range(len(pipes))))
    while open_pipes and time.monotonic() < deadline:
        for pipe in wait(list(open_pipes), timeout=0.2):
            rank = open_pipes.pop(pipe)
            try:
                succeeded, value = pipe.recv()
            except EOFError:
                ranks[rank].join(5)
                succeeded, value = False, f"ended without a result, exit code {ranks[rank].exitcode}"
            (results if succeeded else failures)[rank] = value
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE)
    for rank in open_pipes.values():
        failures.setdefault(rank, "did not end in time")
    if failures:
        for process in ranks:
            process.join(0.5)
        text = "\n".join(f"rank {rank}: {failure}" for rank, failure in failures.items())
        raise RankFailed(text, [process.exitcode for process in ranks])
    return [results[rank] for rank in range(len(ranks))]
