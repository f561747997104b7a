"""How long a step takes on given hardware. No torch.

A step is matrix products at a fraction of the peak, the output layer and attention at smaller ones, elementwise passes
and the optimizer at the bandwidth of the memory, and communication at that of the links; nothing overlaps. The
fractions are those of one training step of the base shape on an H100 (docs/lab-log.md, 2026-11-22). The prediction
ranks layouts; to know the time of a run, measure one step.
"""

from __future__ import annotations

from dataclasses import dataclass

from exlm_dist.model.cost import flops_per_sequence
from exlm_dist.planning.communication import Traffic, bubble, traffic_of_stage
from exlm_dist.planning.job import FP32, Job, Stage, parameters_of_stage

#: Of the peak: a matrix product (785 of 989 TFLOP/s), the vocabulary, which computes its logits twice, attention, which
#: computes its weights twice (85 TFLOP/s of ideal operations at length 191, 113 at 746).
MATRIX_FRACTION, VOCABULARY_FRACTION, ATTENTION_FRACTION = 0.79, 0.43, 0.1
#: Of the memory's bandwidth: a copy (3.0 of 3.35 TB/s). Of a link's: collectives.
MEMORY_FRACTION, LINK_FRACTION = 0.9, 0.8
#: Passes over the hidden states [T, D] for a block, forward and backward: norms, residuals, dropout, gelu and its
#: gradient (over F = 4 D), sums for the biases.
PASSES = 75


@dataclass(frozen=True)
class Hardware:
    """One GPU and its links; the defaults are those of an H100 SXM in a node of eight.

    NVIDIA H100 datasheet: 989 TFLOP/s bf16 dense, 3.35 TB/s HBM3, NVLink 900 GB/s in both directions; between nodes one
    400 Gbit/s InfiniBand port per GPU (DGX H100 user guide).
    """

    flops: float = 989e12  # per second, dense, in the working precision
    memory_bandwidth: float = 3.35e12  # bytes per second
    link_bandwidth: float = 450e9  # bytes per second and direction within a node
    network_bandwidth: float = 50e9  # bytes per second, direction and GPU between nodes
    node_size: int = 8


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by purpose."""

    compute: float
    tensor: float
    pipeline: float
    data: float
    update: float
    bubble: float

    @property
    def total(self) -> float:
        """All seconds of a step."""
        return self.compute + self.tensor + self.pipeline + self.data + self.update + self.bubble


def step_time(job: Job, hardware: Hardware) -> StepTime:
    """Predicted time of a step: the slowest stage sets the pace at which the pipeline also fills and drains."""
    compute, tensor, pipeline, data = 0.0, 0.0, 0.0, 0.0
    for stage in job.stages:
        working = job.accumulation * micro_batch_seconds(job, stage, hardware)
        groups = {name: _seconds(job, traffic_of_stage(job, stage), name, hardware) for name in ("tensor", "pipeline")}
        if working + sum(groups.values()) > compute + tensor + pipeline:
            compute, tensor, pipeline = working, groups["tensor"], groups["pipeline"]
        data = max(data, _seconds(job, traffic_of_stage(job, stage), "data", hardware))
    busy = compute + tensor + pipeline
    waiting = bubble(job.pipeline, job.accumulation)
    return StepTime(compute, tensor, pipeline, data, _update_seconds(job, hardware), busy * waiting / (1 - waiting))


def micro_batch_seconds(job: Job, stage: Stage, hardware: Hardware) -> float:
    """Forward and backward pass of one micro-batch through one stage, with recomputation, without communication."""
    flops = flops_per_sequence(job.model, job.vocab_size, job.sizes)
    work = stage.blocks / job.model.layers / job.tensor * job.config.batch.micro  # sequences through all blocks
    again = 4 / 3 if job.config.parallel.activation_checkpointing else 1.0
    padding = job.tokens / (job.sizes.expanded * job.config.batch.micro)
    matrix, attention = flops["linear"] * work * again * padding, flops["attention"] * work * again
    output = 0.0
    if stage.last:
        output = (flops["token head"] + flops.get("transitions", 0.0)) * job.config.batch.micro / job.tensor
    passes = PASSES * job.model.width * job.element * job.tokens / job.along_tokens * stage.blocks * again
    return (
        matrix / (MATRIX_FRACTION * hardware.flops)
        + output / (VOCABULARY_FRACTION * hardware.flops)
        + attention / (ATTENTION_FRACTION * hardware.flops)
        + passes / (MEMORY_FRACTION * hardware.memory_bandwidth)
    )


def _seconds(job: Job, traffic: list[Traffic], group: str, hardware: Hardware) -> float:
    """Time of the traffic of one group, over the slowest link that the group crosses."""
    # Ranks are numbered pipeline stage first, then data, then tensor (`parallel/layout.py`).
    span = {"tensor": job.tensor, "data": job.tensor * job.data, "pipeline": job.world}[group]
    link = hardware.link_bandwidth if span <= hardware.node_size else hardware.network_bandwidth
    if group == "data" and span > hardware.node_size:
        # The group has node_size // tensor members in a node; its rings leave the node by the ports of all of them.
        link = min(hardware.link_bandwidth, link * max(1, hardware.node_size // job.tensor))
    return sum(part.sent for part in traffic if part.group == group) / (LINK_FRACTION * link)


def _update_seconds(job: Job, hardware: Hardware) -> float:
    """AdamW reads weight, gradient and two moments, and writes all but the gradient, in fp32."""
    count = max(sum(parameters_of_stage(job, stage).values()) for stage in job.stages)
    updated = count / (job.data if job.config.parallel.zero else 1)
    return 7 * FP32 * updated / (MEMORY_FRACTION * hardware.memory_bandwidth)
