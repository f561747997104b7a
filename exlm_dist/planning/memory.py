"""Peak memory of a rank in a step, in bytes. No torch.

Memory can peak at four moments of a step: the loss (all activations, the workspace of the output layer), the backward
pass of a block, the reduction of the gradients, and the update. Each is a sum of parts; the largest is the prediction.
What DeepSpeed allocates was read from its sources (0.19: `zero/stage_1_and_2.py`, `bf16_optimizer.py`,
`zero/stage3.py`) and measured (`benchmarks/memory.py`). Letters as in `planning/job.py`; P parameters of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from exlm_dist.planning import activations
from exlm_dist.planning.job import FP32, Job, Stage, largest_tensor, parameters_of_stage

KINDS = (
    "weights", "gradients", "optimizer", "activations", "states and logits", "buffers", "scratch", "compiled products"
)  # fmt: skip
HOST = "optimizer (host)"
#: What a save is written from: the fp32 weights and moments that a rank owns (docs/checkpoints.md).
COPY = "copy for saves (host)"
ON_HOST = (HOST, COPY)
#: Elements of a communication bucket (`BUCKET` of `training/engine/base.py`).
BUCKET = 50_000_000
Parts = dict[str, float]


@dataclass(frozen=True)
class Peak:
    """The moment of a step at which the memory of a rank of `stage` peaks, and its parts in bytes (`ON_HOST`: host)."""

    stage: int
    moment: str
    parts: Parts

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return sum(size for kind, size in self.parts.items() if kind not in ON_HOST)


def memory_per_rank(job: Job) -> Peak:
    """The peak of the worst rank."""
    return max((peak_of_stage(job, stage) for stage in job.stages), key=lambda peak: peak.total)


def peak_of_stage(job: Job, stage: Stage) -> Peak:
    """The peak of a rank of `stage`."""
    moments = moments_of_stage(job, stage)
    return max((Peak(stage.index, name, parts) for name, parts in moments.items()), key=lambda peak: peak.total)


def moments_of_stage(job: Job, stage: Stage) -> dict[str, Parts]:
    """Parts of every moment, from the second step on (when the moments of AdamW exist)."""
    count, largest = sum(parameters_of_stage(job, stage).values()), largest_tensor(job, stage)
    always = _always(job, count) | {"compiled products": activations.compiled_products(job, stage)}
    moments = {
        name: _join(always, _gradients(job, count, done), parts) for name, (done, parts) in _forward(job, stage).items()
    }
    moments["reduction"] = _join(always, _reduction(job, count, largest))
    moments["update"] = _join(always, _update(job, count, largest))
    return moments


def _join(*several: Parts) -> Parts:
    joined: Parts = {}
    for parts in several:
        for kind, size in parts.items():
            joined[kind] = joined.get(kind, 0.0) + size
    return {kind: joined[kind] for kind in (*KINDS, *ON_HOST) if joined.get(kind)}


def _always(job: Job, count: int) -> Parts:
    """Weights, master weights and the moments of AdamW."""
    zero, half = job.config.parallel.zero, job.element < FP32
    master = FP32 if half or zero else 0
    states = count * (master + 2 * FP32) / (job.data if zero else 1)
    weights = count * job.element / (job.data if zero == 3 else 1)
    where = HOST if job.config.parallel.offload else "optimizer"
    parts = {"weights": weights, where: states, COPY: 3 * FP32 * count / job.data}
    if zero == 3:
        # Parameters gathered ahead and not released yet (`stage3_max_live_parameters` and the prefetch bucket), as
        # received from the ranks and once more in order.
        parts["buffers"] = 2 * job.element * min(count, 5 * bucket(count))
    return parts


def bucket(count: int) -> int:
    """Elements of the communication bucket of a rank with `count` parameters."""
    return min(BUCKET, count)


def _forward(job: Job, stage: Stage) -> dict[str, tuple[int, Parts]]:
    """Parts of the moments of forward and backward pass, each with the number of parameters that have a gradient."""
    parameters = parameters_of_stage(job, stage)
    count, per_block = sum(parameters.values()), parameters["blocks"] // stage.blocks
    kept = activations.block_input(job) if job.config.parallel.activation_checkpointing else activations.block(job)
    entry = activations.embedding(job) if stage.first else activations.block_input(job)
    whole = stage.blocks - stage.last
    in_flight = _in_flight(job, stage, entry + stage.blocks * kept)
    done = sum(size for part, size in parameters.items() if part not in ("blocks", "embedding"))
    # The gradient of a tied matrix from the output layer waits for that from the embedding.
    table = job.vocabulary * job.model.width * job.element
    tied = table if stage.first and stage.last and job.model.tie_head else 0
    moments: dict[str, tuple[int, Parts]] = {}
    if stage.last:
        before = in_flight + entry + whole * kept
        moments |= _output_moments(job, before, done, tied)
        done += per_block
    for left in {0, whole - 1} if whole else ():
        before = in_flight + entry + left * kept
        for name, parts in _block_moments(job, before, tied).items():
            moments[f"{name} of block {left}"] = done + (whole - 1 - left) * per_block, parts
    if stage.first:
        scratch = activations.block_input(job) + table + tied
        parts = {"activations": in_flight + entry, "scratch": scratch}
        moments["embedding"] = count - parameters["embedding"], parts
    return moments


def _in_flight(job: Job, stage: Stage, kept: float) -> float:
    """Activations of the other micro-batches in flight, and the hidden states sent to the next stage."""
    sent = 0.0 if stage.last else activations.block_input(job)
    received = 0.0 if stage.last else activations.block_input(job)
    others = stage.in_flight(job.accumulation) - 1
    return others * (kept + sent) + (sent + received if stage.count > 1 else 0.0)


def _output_moments(job: Job, before: float, head_parameters: int, tied: float) -> dict[str, tuple[int, Parts]]:
    recomputed = job.config.parallel.activation_checkpointing
    own = job.states * job.model.width * job.element if recomputed else activations.last_block(job)
    loss = {
        "activations": before + own + activations.head(job),
        "states and logits": activations.graph(job),
        "scratch": activations.output_work(job),
    }
    inner = activations.feed_forward_work(job, job.states)
    last = {"activations": before + activations.last_block(job), "scratch": inner + tied}
    attention = {
        "activations": before + activations.attention_part(job),
        "scratch": activations.attention_work(job) + tied,
    }
    return {
        "loss": (0, loss),
        "feed-forward of the last block": (head_parameters, last),
        "attention of the last block": (head_parameters, attention),
    }


def _block_moments(job: Job, before: float, tied: float) -> dict[str, Parts]:
    """Backward pass of a block; `before`: bytes kept of the layers before it."""
    return {
        "feed-forward": {
            "activations": before + activations.block(job),
            "scratch": activations.feed_forward_work(job, job.tokens) + tied,
        },
        "attention": {
            "activations": before + activations.attention_part(job),
            "scratch": activations.attention_work(job) + tied,
        },
    }


def _gradients(job: Job, count: int, done: int) -> Parts:
    """During the backward pass, when `done` of `count` parameters have their gradient in this micro-batch."""
    zero, half, repeated = job.config.parallel.zero, job.element < FP32, job.accumulation > 1
    if job.config.parallel.offload and zero:
        return {"buffers": job.element * _filled(job, count, done)}
    if zero >= 2:
        reduced = count if half or repeated or zero == 3 else max(0, done - bucket(count))
        return {"gradients": FP32 * reduced / job.data, "buffers": job.element * _filled(job, count, done)}
    if zero == 1 and half:  # each bf16 gradient is added to its fp32 sum, and freed, as soon as it is there
        return {"gradients": FP32 * count}
    return {"gradients": job.element * (count if repeated else done)}


def _filled(job: Job, count: int, done: int) -> float:
    """Elements of the reduction buckets in memory; on a CPU only those that were written to."""
    if job.gpu:
        return 2 * bucket(count)
    return min(bucket(count), done)


def _reduction(job: Job, count: int, largest: int) -> Parts:
    """End of the backward pass: buckets are full, and copied once more to be sent."""
    zero, half = job.config.parallel.zero, job.element < FP32
    owned, copy = count / job.data, max(bucket(count), min(count, largest))
    cast = FP32 * copy if half and zero else 0
    if job.config.parallel.offload and zero:
        return {"buffers": job.element * (_filled(job, count, count) + copy) + cast}
    if zero >= 2:
        kept = FP32 * owned if half or zero == 3 or job.accumulation > 1 or count > BUCKET else 0
        return {"gradients": kept, "buffers": job.element * (_filled(job, count, count) + copy) + cast}
    if zero == 1 and half:
        return {"gradients": FP32 * count, "buffers": FP32 * copy}
    staged = bucket(count) if zero == 1 and (job.gpu or count > BUCKET) else 0
    return {"gradients": job.element * count, "buffers": job.element * (copy + staged)}


def _update(job: Job, count: int, largest: int) -> Parts:
    """AdamW; on a CPU with two temporary tensors as large as the one that it updates, on a GPU fused."""
    zero, half = job.config.parallel.zero, job.element < FP32
    owned = count / job.data if zero else count
    if job.config.parallel.offload:
        return {}
    temporary = 0 if job.gpu else 2 * FP32 * (owned if zero or half else largest)
    if zero == 0:
        return {"gradients": (job.element + (FP32 if half else 0)) * count, "scratch": temporary}
    if zero == 1 and half:
        return {"gradients": FP32 * count, "scratch": temporary}
    flat = FP32 * owned if job.gpu else 0
    return {"gradients": FP32 * owned, "scratch": max(temporary, flat)}
