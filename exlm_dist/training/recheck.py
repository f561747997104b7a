"""Devices that miscalculate: now and then another replica computes a micro-batch again, and both must agree to the bit.

The same weights, samples, masks and dropout give the same gradient on every device of one kind, so a difference is a
fault. All replicas then compute the disputed micro-batch once more: the majority is right, and who differs from it is
named. (docs/operations.md)
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from exlm_dist.config import RunConfig
from exlm_dist.data.loader import Loader, StepBatches
from exlm_dist.parallel.process import Process
from exlm_dist.tracking import EventLog
from exlm_dist.training.engine.base import Check, Engine
from exlm_dist.training.engine.zero_engine import ZeroEngine
from exlm_dist.training.step import loss_denominator
from exlm_dist.utils.errors import EXIT_RETRY, ConfigError, UserError
from exlm_dist.utils.files import write_atomic
from exlm_dist.utils.logs import get_logger

#: In the run folder: hosts that `slurm/pretrain.sh` leaves out, one a line; and what was found, as JSON lines.
EXCLUDED, FOUND = "excluded-hosts", "miscalculations.jsonl"
#: Steps between two checks if `launch.recheck` is auto.
AUTO_STEPS = 100
logger = get_logger(__name__)


class Miscalculation(UserError):
    """Two computations of the same gradient differ. The run goes on from its newest checkpoint."""

    exit_code = EXIT_RETRY


@dataclass(frozen=True)
class Verdict:
    """Members of a group (replicas, or ranks) that are at fault. Not `certain`: one of them is; `again`: they were
    wrong when all computed once more."""

    members: frozenset[int]
    certain: bool
    again: bool


def judge(claims: Sequence[tuple[int, int]], fresh: Sequence[int]) -> Verdict:
    """Who is at fault, by digests of one micro-batch: `claims` are (replica, digest) of those that were compared,
    `fresh` what each replica found when all of them computed it once more.

    What more than half of `fresh` agree on is right. Without such a majority (two replicas that disagree for good)
    those that contradict their own claim are at fault; if none does, any of them may be.
    """
    value, votes = Counter(fresh).most_common(1)[0]
    wrong_now = frozenset(replica for replica, digest in enumerate(fresh) if digest != value)
    if 2 * votes > len(fresh):
        wrong_before = frozenset(replica for replica, digest in claims if digest != value)
        return Verdict(wrong_now | wrong_before, certain=True, again=bool(wrong_now))
    fickle = frozenset(replica for replica, digest in claims if digest != fresh[replica])
    if fickle:
        return Verdict(fickle, certain=True, again=False)
    return Verdict(frozenset(range(len(fresh))), certain=False, again=True)


@dataclass
class Recheck:
    """The checks of one launch. `hosts`: of each rank; `events`: on rank 0 only; `failed`: in the run so far."""

    every: int
    process: Process
    engine: ZeroEngine
    loader: Loader
    config: RunConfig
    folder: Path
    hosts: list[str]
    events: EventLog | None = None
    failed: int = field(init=False)

    def __post_init__(self) -> None:
        found = self.folder / FOUND
        self.failed = len(found.read_text().splitlines()) if found.exists() else 0

    @staticmethod
    def of(
        config: RunConfig, process: Process, engine: Engine, loader: Loader, folder: Path, events: EventLog | None
    ) -> Recheck | None:
        """The checks that `launch.recheck` asks for; None for none. A collective. ConfigError if it asks for a number
        and the ranks are on devices of several kinds, which may differ in the last bit without a fault."""
        every = config.launch.recheck
        if every == 0 or not isinstance(engine, ZeroEngine):
            return None
        hosts, kinds = zip(*process.all_gather_object([host_name(), device_kind(process.device)]))
        if every == "auto":
            # A sum over more than two tensor ranks may be made in another order on another node.
            repeats = len(set(kinds)) == 1 and process.grid.tensor.size <= 2
            every = AUTO_STEPS if repeats and len(set(hosts)) > 1 else 0
        elif len(set(kinds)) > 1:
            several = "; ".join(f"{kind} on {hosts[kinds.index(kind)]}" for kind in sorted(set(kinds)))
            raise ConfigError(
                f"launch.recheck {every} compares to the bit, but the ranks are on several kinds of device "
                f"({several}). Set launch.recheck 0, or start the job on one kind."
            )
        return Recheck(every, process, engine, loader, config, folder, list(hosts), events) if every else None

    def is_due(self, step: int, *, saved: bool) -> bool:
        """Whether the step that makes `step` steps done is checked; `saved`: a checkpoint follows it."""
        return saved or step % self.every == 0

    def of_step(self, batches: StepBatches, *, scored: bool) -> Check:
        """What `Engine.train` calls before the update of this step. Miscalculation on every rank if replicas differ."""
        scored = scored and len(batches.micro_batches) == 1  # scores are measured on the last micro-batch
        return lambda trained: self._compare(batches, trained, scored)

    def _compare(self, batches: StepBatches, trained: int, scored: bool) -> None:
        """Compute the first micro-batch of the replica before this one again; all must agree."""
        mine, count = self.engine.replica
        again = self._digest(batches, (mine - 1) % count, scored)
        every = self.process.all_gather_object([trained, again])
        groups = self.process.grid.layout.groups("data")
        for replica in range(count):
            after = (replica + 1) % count
            claims = [[(replica, every[group[replica]][0]), (after, every[group[after]][1])] for group in groups]
            if any(first != second for (_, first), (_, second) in claims):
                fresh = self.process.all_gather_object(self._digest(batches, replica, scored))
                verdicts = [judge(pair, [fresh[rank] for rank in group]) for pair, group in zip(claims, groups)]
                self._report(batches.step, verdicts, groups, {"claims": claims, "fresh": fresh})
        if self.events is not None:
            self.events.metrics(batches.step + 1, {"recheck/failed": self.failed})

    def _digest(self, batches: StepBatches, replica: int, scored: bool) -> int:
        """Of the first micro-batch of a replica, computed here."""
        own = replica == self.engine.replica[0]
        batch = batches.micro_batches[0] if own else self.loader.first_of(batches.step, replica)
        return self.engine.digest(batch, loss_denominator(batches, self.config), scored=scored)

    def _report(self, step: int, verdicts: list[Verdict], groups: list[list[int]], digests: dict[str, Any]) -> None:
        """Write down who is at fault; raises Miscalculation."""
        at_fault = [(verdict, group) for verdict, group in zip(verdicts, groups) if verdict.members]
        certain = any(verdict.certain for verdict, _ in at_fault)
        named = [(verdict, group) for verdict, group in at_fault if verdict.certain == certain]
        ranks = sorted(group[member] for verdict, group in named for member in verdict.members)
        again = any(verdict.again for verdict, _ in named)
        hosts = sorted({self.hosts[rank] for rank in ranks})
        message = _message(step + 1, ranks, self.hosts, certain, again, self.folder)
        if self.process.is_first:
            self.failed += 1
            found = {"time": time.time(), "step": step + 1, "ranks": ranks, "hosts": hosts}
            _append(self.folder / FOUND, json.dumps({**found, "certain": certain, "again": again, **digests}))
            if certain:
                exclude(self.folder, hosts)
        if self.events is not None:
            self.events.tags({f"miscalculation_step_{step + 1}": message})
            self.events.metrics(step + 1, {"recheck/failed": self.failed})
        raise Miscalculation(message)


def exclude(folder: Path, hosts: Sequence[str]) -> None:
    """Add hosts to the file of those that the run folder `folder` excludes."""
    file = folder / EXCLUDED
    known = file.read_text().split() if file.exists() else []
    write_atomic(file, "".join(f"{host}\n" for host in dict.fromkeys([*known, *hosts])))


def host_name() -> str:
    """This machine as Slurm names it, else as it names itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def device_kind(device: torch.device) -> str:
    """Model of the GPU or processor: devices of equal kind compute the same bits."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return models[0].partition(":")[2].strip() if models else platform.machine()


def _message(step: int, ranks: list[int], hosts: list[str], certain: bool, again: bool, folder: Path) -> str:
    named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)
    undone = f"Step {step} was not taken; the run goes on from its newest checkpoint."
    file = folder / EXCLUDED
    if not certain:
        return (
            f"step {step}: {named} compute different gradients of the same micro-batch, each the same one again. "
            "Either may be at fault, as two cannot outvote one another: no host was excluded. "
            f"{undone} Run `exlm doctor` on each alone and write the name of the one at fault into {file}, or start "
            "with a third replica, which decides."
        )
    how = "and again when it was computed once more" if again else "but not when it was computed once more"
    return (
        f"step {step}: {named} miscalculated: a gradient differs from that of the other computations of the same "
        f"micro-batch, {how}. {undone} The host is in {file}, which slurm/pretrain.sh leaves out from the "
        "next start on. Without Slurm, take it out of the job yourself."
    )


def _append(file: Path, line: str) -> None:
    with file.open("a") as log:
        log.write(line + "\n")
        log.flush()
        os.fsync(log.fileno())
