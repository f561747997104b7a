"""Layouts of a run on a number of GPUs: all that are valid, which of them fit, and the fastest of these. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from exlm_dist.config import RunConfig, check_config, check_vocabulary, check_world
from exlm_dist.planning.communication import Traffic, bubble, worst_traffic
from exlm_dist.planning.hardware import Hardware, StepTime, step_time
from exlm_dist.planning.job import Job
from exlm_dist.planning.memory import ON_HOST, Peak, memory_per_rank
from exlm_dist.utils.errors import ConfigError

GIB = 2**30
#: Layouts whose predicted times differ by less than this factor count as equally fast: the prediction is no better.
ABOUT = 1.1
#: Multiples of the number of GPUs that are tried when nothing fits.
_MORE = (2, 4, 8, 16)


@dataclass(frozen=True)
class Plan:
    """One layout and what it needs."""

    job: Job
    hardware: Hardware

    @property
    def config(self) -> RunConfig:
        """The configuration with this layout."""
        return self.job.config

    @cached_property
    def peak(self) -> Peak:
        """Memory of the worst rank."""
        return memory_per_rank(self.job)

    @cached_property
    def time(self) -> StepTime:
        """Predicted time of a step."""
        return step_time(self.job, self.hardware)

    @cached_property
    def traffic(self) -> list[Traffic]:
        """Traffic of a step, of the rank that sends most."""
        return worst_traffic(self.job)

    @property
    def bubble(self) -> float:
        """Fraction of a step in which a stage waits for the others."""
        return bubble(self.job.pipeline, self.job.accumulation)

    @property
    def complexity(self) -> tuple[float, ...]:
        """Smaller for a layout with fewer kinds of parallelism."""
        parallel = self.config.parallel
        degrees = (parallel.tensor * parallel.pipeline, parallel.pipeline)
        return (parallel.zero, *degrees, parallel.sequence, parallel.activation_checkpointing, self.time.total)


@dataclass(frozen=True)
class Request:
    """What to plan: `config` on `gpus` GPUs of `memory` bytes, of which the fraction `margin` stays unused."""

    config: RunConfig
    vocab_size: int
    length: int
    gpus: int
    memory: float
    margin: float
    hardware: Hardware

    @property
    def usable(self) -> float:
        """Bytes that the predicted peak may reach."""
        return self.memory * (1 - self.margin)

    def plan(self, config: RunConfig, gpus: int | None = None) -> Plan:
        """The layout that `config` sets."""
        return Plan(Job(config, self.vocab_size, self.length, gpus or self.gpus, gpu=True), self.hardware)


def find_plans(request: Request) -> list[Plan]:
    """Layouts that fit, the fastest first.

    Raises:
        ConfigError: no layout is valid on so many GPUs, or none fits; says what is too large and what would fit.
    """
    plans = [request.plan(config) for config in layouts(request.config, request.gpus, request)]
    if not plans:
        raise ConfigError(_no_valid_layout(request))
    fitting = sorted((plan for plan in plans if plan.peak.total <= request.usable), key=lambda plan: plan.time.total)
    if not fitting:
        raise ConfigError(_none_fits(request, min(plans, key=lambda plan: plan.peak.total)))
    return fitting


def recommended(plans: list[Plan]) -> Plan:
    """The least complex of those about as fast as the fastest: the time is a prediction."""
    fastest = min(plan.time.total for plan in plans)
    return min((plan for plan in plans if plan.time.total <= ABOUT * fastest), key=lambda plan: plan.complexity)


def layouts(config: RunConfig, gpus: int, request: Request, *, smallest: bool = False) -> Iterator[RunConfig]:
    """Configurations for every valid layout.

    Tensor-parallel groups stay within a node. ZeRO 0 is left out: it saves nothing, and sums bf16 gradients in bf16.
    `smallest`: only those with micro-batches of one sequence and recomputation.
    """
    sequences = config.batch.sequences
    for tensor in _divisors(gpus, request.hardware.node_size):
        for pipeline in _divisors(gpus // tensor, config.model.layers):
            data = gpus // (tensor * pipeline)
            grid = {"tensor": tensor, "pipeline": pipeline, "data": data, "sequence": False, "zero": 1}
            if sequences % data or not _is_valid(_with(config, grid, 1), gpus, request.vocab_size):
                continue
            micros = [1] if smallest else _divisors(sequences // data, sequences // data)
            for zero in (1,) if pipeline > 1 or data == 1 else (1, 2, 3):
                for sequence in (False, True)[: 1 + (tensor > 1)]:
                    for recompute in (True,) if smallest else (False, True):
                        grid |= {"zero": zero, "sequence": sequence, "activation_checkpointing": recompute}
                        yield from (_with(config, grid, micro) for micro in micros)


def _with(config: RunConfig, parallel: Mapping[str, object], micro: int) -> RunConfig:
    changed = {
        "parallel": config.parallel.model_copy(update=parallel),
        "batch": config.batch.model_copy(update={"micro": micro}),
        "launch": config.launch.model_copy(update={"processes": "auto"}),
    }
    return config.model_copy(update=changed)


def _is_valid(config: RunConfig, gpus: int, vocab_size: int) -> bool:
    """Whether the settings pass the checks of a run."""
    try:
        check_config(config)
        check_world(config, gpus)
        check_vocabulary(vocab_size, config.parallel.tensor)
    except ConfigError:
        return False
    return True


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]


def _no_valid_layout(request: Request) -> str:
    """Why no layout passes the checks: most often the batch, which is the same for all."""
    try:
        check_config(request.config)
        check_world(_with(request.config, {"tensor": 1, "pipeline": 1, "data": "auto"}, 1), request.gpus)
    except ConfigError as error:
        return f"no layout of {request.config.name} works on {_gpus(request)}: {error}"
    return f"no layout of {request.config.name} works on {_gpus(request)} in nodes of {request.hardware.node_size}."


def _none_fits(request: Request, best: Plan) -> str:
    parts = {kind: size for kind, size in best.peak.parts.items() if kind not in ON_HOST}
    largest = max(parts, key=lambda kind: parts[kind])
    parallel = best.config.parallel
    needed = best.peak.total / (1 - request.margin) / GIB
    lines = [
        f"no layout of {request.config.name} fits on {_gpus(request)} of {request.memory / GIB:g} GiB. The smallest "
        f"(tensor {parallel.tensor}, pipeline {parallel.pipeline}, data {parallel.data}, zero {parallel.zero}, "
        f"batch.micro {best.config.batch.micro}) needs {best.peak.total / GIB:.1f} GiB of the "
        f"{request.usable / GIB:.1f} GiB that a margin of {request.margin:.0%} leaves; the largest part is "
        f"{largest}, {parts[largest] / GIB:.1f} GiB (at the {best.peak.moment}).",
        f"What would fit: {'; or '.join(_remedies(request, needed))}.",
    ]
    return "\n".join(lines)


def _gpus(request: Request) -> str:
    return f"{request.gpus} GPU{'s' if request.gpus > 1 else ''}"


def _remedies(request: Request, needed: float) -> list[str]:
    found = [f"--gpu-memory {int(needed) + 1}"]
    for times in _MORE:
        gpus = request.gpus * times
        if _least(request, request.config, gpus) <= request.usable:
            found.append(f"--gpus {gpus}")
            break
    if not request.config.parallel.offload:
        offload = request.config.parallel.model_copy(update={"offload": True})
        if _least(request, request.config.model_copy(update={"parallel": offload}), request.gpus) <= request.usable:
            found.append("parallel.offload true")
    shorter = request.length
    while shorter > 32:
        shorter //= 2
        shortened = replace(request, length=shorter)
        if _least(shortened, request.config, request.gpus) <= request.usable:
            found.append(f"sequences of {shorter} tokens")
            break
    return found


def _least(request: Request, config: RunConfig, gpus: int) -> float:
    """Bytes of the layout that needs the least."""
    plans = (request.plan(found, gpus) for found in layouts(config, gpus, request, smallest=True))
    return min((plan.peak.total for plan in plans), default=float("inf"))
