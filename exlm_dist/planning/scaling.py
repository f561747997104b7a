"""A layout on more and on fewer GPUs: the critical path of a step and what failures leave of it. No torch.

`step_time` has what a GPU computes and sends. Here is what grows with the number of ranks beside it: latencies of
collectives, the exchange by which ranks agree, waiting for the slowest, storage that all have in common, and
failures. Every constant is in `Cluster`, with where it is from; docs/parallelism.md says what is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from exlm_dist.model.cost import count_parameters
from exlm_dist.planning.communication import Traffic, worst_traffic
from exlm_dist.planning.hardware import Hardware, step_time
from exlm_dist.planning.job import FP32, Job

#: Bytes that a checkpoint has for each parameter: weight and two moments in fp32.
SAVED = 12
#: Elements of a collective of gradients or weights (`BUCKET` of training/engine/deepspeed_config.py).
BUCKET = 50e6
#: Numbers of GPUs of a table.
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
HOUR = 3600.0


@dataclass(frozen=True)
class Cluster:
    """Latencies, storage and failures. Orders of magnitude, not measurements of ours: replace what you know.

    Failures: Llama 3 405B saw 419 unexpected interruptions in 54 days on 16,384 GPUs (arXiv 2407.21783), one in 50,700
    hours of a GPU.
    """

    launch: float = 20e-6  # seconds before the first byte of a collective
    hop: float = 5e-6  # seconds of a message from one GPU to the next between nodes, as in NCCL over InfiniBand
    link_hop: float = 1.5e-6  # the same within a node
    control_hop: float = 35e-6  # seconds of a message between processes over TCP, as in gloo
    control_every: int = 1  # steps between exchanges by which all ranks agree whether to stop
    jitter: float = 0.01  # standard deviation of the time that ranks take for equal work, as a fraction of it
    read: float = 1.5e-3  # seconds of a read at a random place of a parallel file system
    reads: float = 400e3  # such reads per second that it serves in all
    node_storage: float = 2e9  # bytes per second that a node writes or reads
    storage: float = 100e9  # bytes per second in all
    copy: float = 20e9  # bytes per second from a GPU into the memory of its host
    start: float = 180.0  # seconds from a failure to the first step, without reading the checkpoint
    failure: float = 50_700 * HOUR  # seconds of one GPU between two failures


@dataclass(frozen=True)
class CriticalPath:
    """Seconds of a step that nothing hides, by cause; see `critical_path`."""

    compute: float  # with the bubble and the update
    bandwidth: float  # bytes that are sent
    latency: float  # hops and starts of collectives
    control: float  # the ranks' agreement
    slowest: float  # waiting for the slowest rank
    reading: float  # samples that the background thread has not read in time
    saving: float  # copies of the state, per step

    @property
    def total(self) -> float:
        """Seconds of a step, saves included."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Outlook:
    """A run on so many GPUs."""

    job: Job
    path: CriticalPath
    write: float  # seconds until a checkpoint is written, in the background
    goodput: float  # fraction of the wall time in steps that count, saves and failures taken off
    best_every: int  # steps between checkpoints with the highest goodput

    @property
    def tokens_per_second(self) -> float:
        """Unexpanded tokens, over the wall time."""
        tokens = self.job.config.batch.sequences * self.job.length
        return tokens / (self.path.total - self.path.saving) * self.goodput


def outlook(job: Job, hardware: Hardware, cluster: Cluster) -> Outlook:
    """What to expect of a job."""
    path, every = critical_path(job, hardware, cluster), job.config.checkpoint.every
    stall, write = _save_seconds(job, hardware, cluster)
    useful = path.total - path.saving
    candidates = {every, *(round(10 ** (power / 20)) for power in range(20, 120))}
    best = max(candidates, key=lambda steps: _goodput(job, cluster, useful, stall, write, steps))
    return Outlook(job, path, write, _goodput(job, cluster, useful, stall, write, every), best)


def critical_path(job: Job, hardware: Hardware, cluster: Cluster) -> CriticalPath:
    """The step of the slowest stage, as `step_time` has it, and what comes on top of it with many ranks."""
    step = step_time(job, hardware)
    compute, bandwidth = step.compute + step.bubble + step.update, step.tensor + step.pipeline + step.data
    latency = sum(_latency(job, traffic, hardware, cluster) for traffic in worst_traffic(job))
    # A ring: each rank's flag passes all others. (gloo, on the CPU, while the GPU waits.)
    control = (job.world - 1) * cluster.control_hop / cluster.control_every
    # The largest of n normally distributed times lies sqrt(2 ln n) deviations above their mean.
    slowest = cluster.jitter * math.sqrt(2 * math.log(job.world)) * (compute + bandwidth) if job.world > 1 else 0.0
    working = compute + bandwidth + latency + control + slowest
    samples = job.config.batch.sequences / job.data
    reading = max(samples * cluster.read, samples * job.world / cluster.reads)  # every rank of a replica reads them
    stall, write = _save_seconds(job, hardware, cluster)
    every = job.config.checkpoint.every
    saving = (stall + max(0.0, write - every * working)) / every
    return CriticalPath(compute, bandwidth, latency, control, slowest, max(0.0, reading - working), saving)


def scaled(job: Job, world: int, *, fixed_batch: bool = False) -> Job | None:
    """The layout of `job` on `world` ranks, with more or fewer replicas; the global batch grows in proportion, or with
    `fixed_batch` stays and is accumulated less often. None where that does not divide."""
    unit = job.tensor * job.pipeline
    if world % unit:
        return None
    data, batch = world // unit, job.config.batch
    sequences = batch.sequences if fixed_batch else batch.sequences // job.data * data
    micro = min(batch.micro, sequences // data) if sequences % data == 0 else 0
    if not micro or sequences % (data * micro):
        return None
    parallel = job.config.parallel.model_copy(update={"data": data})
    changed = {"parallel": parallel, "batch": batch.model_copy(update={"sequences": sequences, "micro": micro})}
    return replace(job, config=job.config.model_copy(update=changed), world=world)


def saved_every(job: Job, steps: int) -> Job:
    """`job` with a checkpoint after so many steps."""
    checkpoint = job.config.checkpoint.model_copy(update={"every": steps})
    return replace(job, config=job.config.model_copy(update={"checkpoint": checkpoint}))


def scale_table(job: Job, hardware: Hardware, cluster: Cluster, sizes: Sequence[int] = SIZES) -> list[str]:
    """Lines of `exlm plan --scale`: the layout of `job` on each number of GPUs, the batch in proportion."""
    found = [outlook(made, hardware, cluster) for size in sizes if (made := scaled(job, size)) is not None]
    names = ("compute", "bandwidth", "latency", "control", "slowest", "reading", "saving")
    head = ["GPUs", "sequences", "step s", *(f"{name} %" for name in names), "M tokens/s", "per GPU", "goodput"]
    rows = [[*head, "best every"]]
    for this in found:
        per_gpu = this.tokens_per_second / this.job.world / (found[0].tokens_per_second / found[0].job.world)
        rows.append([
            str(this.job.world), str(this.job.config.batch.sequences), f"{this.path.total:.3f}",
            *(f"{getattr(this.path, name) / this.path.total:.1%}".removesuffix("%") for name in names),
            f"{this.tokens_per_second / 1e6:.3g}", f"{per_gpu:.0%}", f"{this.goodput:.1%}", str(this.best_every),
        ])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]


def _latency(job: Job, traffic: Traffic, hardware: Hardware, cluster: Cluster) -> float:
    """Starts and hops: a tree for an all-reduce, a ring to gather and to scatter (NCCL's choices over many nodes)."""
    in_a_node = max(1, hardware.node_size // job.tensor) if traffic.group == "data" else hardware.node_size
    nodes = 1 if traffic.group == "tensor" else -(-traffic.ranks // in_a_node)
    if traffic.collective == "send":
        within, between = 0, 1
    elif traffic.collective == "all_reduce":
        within, between = 2 * _levels(traffic.ranks // nodes), 2 * _levels(nodes)
    else:
        within, between = traffic.ranks - nodes, nodes - 1
    return _calls(job, traffic) * (cluster.launch + within * cluster.link_hop + between * cluster.hop)


def _calls(job: Job, traffic: Traffic) -> int:
    """Collectives of a step for one purpose; those of the replicas are cut into buckets, at ZeRO 3 weights by layer."""
    if traffic.group != "data":
        return traffic.calls
    if job.config.parallel.zero == 3 and traffic.what == "weights":
        return traffic.calls * (job.model.layers + 2)
    width = FP32 if traffic.what == "gradients" and job.config.parallel.zero else job.element
    return traffic.calls * math.ceil(traffic.payload / traffic.calls / width / BUCKET)


def _levels(ranks: int) -> int:
    """Levels of a binary tree."""
    return math.ceil(math.log2(max(1, ranks)))


def _save_seconds(job: Job, hardware: Hardware, cluster: Cluster) -> tuple[float, float]:
    """(while training waits for the copy in host memory, until it is written) of one checkpoint."""
    saved = SAVED * sum(count_parameters(job.model, job.vocab_size).values())
    nodes = max(1, job.world // hardware.node_size)
    return saved / job.world / cluster.copy, saved / min(nodes * cluster.node_storage, cluster.storage)


def _goodput(job: Job, cluster: Cluster, useful: float, stall: float, write: float, every: int) -> float:
    """Fraction of the wall time in steps that count, with a save every so many steps of `useful` seconds.

    A failure costs the start, reading the checkpoint (as long as writing it), and what was done since the newest one
    that was complete: half an interval, and the time that a save takes to be written. First order in the failure rate.
    """
    interval = every * useful + stall + max(0.0, write - every * useful)
    rate = job.world / cluster.failure
    lost = cluster.start + write + interval / 2 + write
    return every * useful / interval * max(0.0, 1 - rate * lost)
