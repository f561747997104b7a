"""Ranks of a run for chaos.py: forked from a process that has imported torch once, killed from outside as planned."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from exlm_dist.config import RunConfig
from exlm_dist.launch.local import rank_environments
from exlm_dist.utils.errors import UserError
from exlm_dist.utils.logs import configure_logging

PRELOAD = ["torch", "deepspeed", "safetensors.torch", "exlm_dist.training.session"]
#: Points of the program at which a rank reports where it is; `start` is the start of the process.
PHASES = ("start", "load", "step", "save")
#: Seconds within which the others must end by themselves once a rank has failed.
GRACE = 15.0
#: Seconds for one launch, many times what it needs.
PATIENCE = 240.0


@dataclass(frozen=True)
class Kill:
    """`delay` seconds after rank `victim` has reached `phase` for the `count`-th time, it gets the signal `number`."""

    victim: int
    phase: str
    count: int
    delay: float
    number: int

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return f"{name} to rank {self.victim} {self.delay * 1000:.0f} ms into {self.phase} {self.count}"


@dataclass(frozen=True)
class Ended:
    """How a launch ended: exit codes by rank, whether the signal was sent, and the ranks that had to be killed here."""

    codes: list[int]
    killed: bool
    stuck: list[int]
    seconds: float


def launch(config: RunConfig, world: int, folder: Path, kill: Kill | None) -> Ended:
    """Train `config` on `world` ranks as `exlm pretrain` does, and wait until all have ended.

    `folder`: for the log (`log`) and the sample ids of every step (`samples-<launch>-<rank>`).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    number = len({path.name.split("-")[1] for path in folder.glob("samples-*")})
    marks, announce = context.Pipe(duplex=False)
    begun = time.monotonic()
    ranks = []
    for rank, environment in enumerate(rank_environments(world, folder)):
        samples = folder / f"samples-{number}-{rank}"
        announced = announce if kill is not None and rank == kill.victim else None
        ranks.append(
            context.Process(target=_rank, args=(config.model_dump(), environment, announced, str(samples)), daemon=True)
        )
    for process in ranks:
        process.start()
    announce.close()
    try:
        killed = kill is not None and _kill(ranks, marks, kill)
        stuck = _wait(ranks)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
        marks.close()
    return Ended([process.exitcode for process in ranks], killed, stuck, time.monotonic() - begun)


def _kill(ranks: list, marks: Connection, kill: Kill) -> bool:
    """Wait for the moment and send the signal; False if it never came."""
    seen = 0
    while True:
        try:
            mark = marks.recv_bytes().decode()  # ends with the victim: no other process has the other end open
        except EOFError:
            return False
        seen += mark == kill.phase
        if seen == kill.count and mark == kill.phase:
            time.sleep(kill.delay)
            victim = ranks[kill.victim]
            if not victim.is_alive():
                return False
            os.kill(victim.pid, kill.number)
            return True


def _wait(ranks: list) -> list[int]:
    """Wait until all have ended; the ranks that did not in time."""
    deadline = time.monotonic() + PATIENCE
    failed = False
    while any(process.is_alive() for process in ranks):
        if not failed and any(process.exitcode for process in ranks):
            failed, deadline = True, time.monotonic() + GRACE
        if time.monotonic() > deadline:
            return [number for number, process in enumerate(ranks) if process.is_alive()]
        time.sleep(0.01)
    return []


def _rank(settings: dict[str, Any], environment: dict[str, str], marks: Connection | None, samples: str) -> None:
    """One rank, run from its start as by `exlm pretrain`."""
    os.environ.update(environment)
    os.dup2(os.open(str(Path(samples).with_name("log")), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    announce = (lambda phase: marks.send_bytes(phase.encode())) if marks is not None else (lambda phase: None)
    announce("start")
    configure_logging("WARNING")
    import torch

    torch.set_num_threads(1)
    from exlm_dist.launch import heartbeat
    from exlm_dist.training.loop import train

    _instrument(announce, samples)
    try:
        code = train(RunConfig.model_validate(settings))
    except BaseException as error:
        sys.stderr.write(f"[{os.environ['RANK']}] {type(error).__name__}: {error}\n")
        code = error.exit_code if isinstance(error, UserError) else 1
    heartbeat.stop()
    os._exit(code)


def _instrument(announce: Any, samples: str) -> None:
    """Report where this rank is, and record the sample ids of every step that it has done."""
    from exlm_dist.training import session

    record = os.open(samples, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def announced(phase: str, method: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            announce(phase)
            return method(*arguments, **keywords)

        return call

    session._resume = announced("load", session._resume)
    session.Session.train_step = announced("step", session.Session.train_step)
    session.Checkpointer.save = announced("save", session.Checkpointer.save)
    step = session.optimizer_step

    def optimizer_step(engine: Any, batches: Any, *arguments: Any, **keywords: Any) -> Any:
        ids = [str(sample) for batch in batches.micro_batches for sample in batch.sample_ids]
        result = step(engine, batches, *arguments, **keywords)
        os.write(record, f"{batches.step} {os.environ['WORLD_SIZE']} {' '.join(ids)}\n".encode())
        return result

    session.optimizer_step = optimizer_step
