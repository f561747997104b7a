"""How long a step takes on stated hardware. No torch here.

A step is matrix products at a share of the peak, the output layer and attention at smaller ones, elementwise passes
and the optimizer at the speed of the memory, and what is sent at the speed of the links; nothing overlaps. The shares
are those of one training step of the base shape on an H100 (docs/lab-log.md, 2026-11-22). The prediction ranks
layouts; for the time of a run measure one step.
"""

from __future__ import annotations

from dataclasses import dataclass

from exlm_dist.model.cost import flops_per_sequence
from exlm_dist.planning.communication import Traffic, bubble, traffic_of_stage
from exlm_dist.planning.job import FP32, Job, Stage, parameters_of_stage

#: Of the peak: a matrix product (785 of 989 TFLOP/s), the vocabulary with its logits made twice, attention with its
#: weights made twice (85 TFLOP/s of ideal operations at length 191, 113 at 746).
MATRIX_SHARE, VOCABULARY_SHARE, ATTENTION_SHARE = 0.79, 0.43, 0.1
#: Of the memory's speed: a copy (3.0 of 3.35 TB/s). Of a link's: what collectives reach.
MEMORY_SHARE, LINK_SHARE = 0.9, 0.8
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
    """Seconds of a step, by what they are spent on."""

    compute: float
    tensor: float
    pipeline: float
    data: float
    update: float
    bubble: float

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.compute + self.tensor + self.pipeline + self.data + self.update + self.bubble


def step_time(job: Job, hardware: Hardware) -> StepTime:
    """Predicted time of a step: the slowest stage sets the pace, and the pipeline fills and drains at that pace."""
    compute, tensor, pipeline, data = 0.0, 0.0, 0.0, 0.0
    for stage in job.stages:
        working = job.accumulation * micro_batch_seconds(job, stage, hardware)
        groups = {name: _seconds(job, traffic_of_stage(job, stage), name, hardware) for name in ("tensor", "pipeline")}
        if working + sum(groups.values()) > compute + tensor + pipeline:
            compute, tensor, pipeline = working, groups["tensor"], groups["pipeline"]
        data = max(data, _seconds(job, traffic_of_stage(job, stage), "data", hardware))
    busy = compute + tensor + pipeline
    share = bubble(job.pipeline, job.accumulation)
    return StepTime(compute, tensor, pipeline, data, _update_seconds(job, hardware), busy * share / (1 - share))


def micro_batch_seconds(job: Job, stage: Stage, hardware: Hardware) -> float:
    """Forward and backward pass of one micro-batch through one stage, recomputation counted, nothing sent."""
    flops = flops_per_sequence(job.model, job.vocab_size, job.sizes)
    share = stage.blocks / job.model.layers / job.tensor * job.config.batch.micro
    again = 4 / 3 if job.config.parallel.activation_checkpointing else 1.0
    padding = job.tokens / (job.sizes.expanded * job.config.batch.micro)
    matrix, attention = flops["linear"] * share * again * padding, flops["attention"] * share * again
    output = 0.0
    if stage.last:
        output = (flops["token head"] + flops.get("transitions", 0.0)) * job.config.batch.micro / job.tensor
    passes = PASSES * job.model.width * job.element * job.tokens / job.along_tokens * stage.blocks * again
    return (
        matrix / (MATRIX_SHARE * hardware.flops)
        + output / (VOCABULARY_SHARE * hardware.flops)
        + attention / (ATTENTION_SHARE * hardware.flops)
        + passes / (MEMORY_SHARE * hardware.memory_bandwidth)
    )


def _seconds(job: Job, traffic: list[Traffic], group: str, hardware: Hardware) -> float:
    """Time of the traffic of one group, at the slowest link that the group crosses."""
    # Ranks are numbered pipeline stage first, then data, then tensor (`parallel/layout.py`).
    span = {"tensor": job.tensor, "data": job.tensor * job.data, "pipeline": job.world}[group]
    link = hardware.link_bandwidth if span <= hardware.node_size else hardware.network_bandwidth
    if group == "data" and span > hardware.node_size:
        # A ring passes a node boundary once for each of its members in a node that sit side by side.
        link = min(hardware.link_bandwidth, link * max(1, hardware.node_size // job.tensor))
    return sum(part.sent for part in traffic if part.group == group) / (LINK_SHARE * link)


def _update_seconds(job: Job, hardware: Hardware) -> float:
    """AdamW reads weight, gradient and two moments and writes three of them, in fp32."""
    count = max(sum(parameters_of_stage(job, stage).values()) for stage in job.stages)
    share = count / (job.data if job.config.parallel.zero else 1)
    return 7 * FP32 * share / (MEMORY_SHARE * hardware.memory_bandwidth)
