"""Which layouts over ranks are valid. Each error names both values and the nearest that fit. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from exlm_dist.config.schema import ParallelConfig, RunConfig
from exlm_dist.utils.errors import ConfigError


def layout_problems(config: RunConfig) -> list[str]:
    """Why the layout of `config` is invalid on any number of ranks; empty if it is not."""
    parallel, model = config.parallel, config.model
    return [
        *_not_divisible(parallel.tensor, "model.heads", model.heads),
        *_not_divisible(parallel.tensor, "model.ffn", model.ffn),
        *_too_many_stages(parallel.pipeline, model.layers),
        *_zero_under_a_pipeline(parallel),
        *_sequence_without_tensor(parallel),
        *_recheck_with_stages(config),
    ]


def data_degree(parallel: ParallelConfig, world: int) -> int:
    """Number of replicas of the model on `world` ranks; ConfigError if tensor x pipeline (x data) does not fit them."""
    unit = parallel.tensor * parallel.pipeline
    product = f"parallel.tensor {parallel.tensor} x parallel.pipeline {parallel.pipeline}"
    if parallel.data == "auto":
        if world % unit:
            raise ConfigError(
                f"{world} ranks are not a multiple of {product} = {unit}. "
                f"Nearest that fit: {_listing(_multiples(world, unit))} ranks; or {_units(parallel, world)}."
            )
        return world // unit
    if unit * parallel.data != world:
        fits = "" if world % unit else f", or set parallel.data {world // unit} (or auto)"
        raise ConfigError(
            f"{product} x parallel.data {parallel.data} = {unit * parallel.data} ranks, but there are {world}. "
            f"Start {unit * parallel.data}{fits}."
        )
    return parallel.data


def check_vocabulary(vocab_size: int, tensor: int) -> None:
    """ConfigError if a tensor-parallel rank would get no row of the vocabulary (it is padded and split evenly)."""
    if tensor > 1 and -(-vocab_size // tensor) * (tensor - 1) >= vocab_size:
        fits = max(t for t in range(1, tensor) if -(-vocab_size // t) * (t - 1) < vocab_size)
        raise ConfigError(
            f"a vocabulary of {vocab_size} entries leaves nothing for the last of parallel.tensor {tensor} ranks. "
            f"Nearest that fits: parallel.tensor {fits}."
        )


def _not_divisible(tensor: int, name: str, value: int) -> list[str]:
    if value % tensor == 0:
        return []
    degrees = _around(tensor, [degree for degree in range(1, value + 1) if value % degree == 0])
    return [
        f"{name} {value} is not a multiple of parallel.tensor {tensor}. "
        f"Nearest that fit: parallel.tensor {_listing(degrees)}; or {name} {_listing(_multiples(value, tensor))}."
    ]


def _too_many_stages(pipeline: int, layers: int) -> list[str]:
    if pipeline <= layers:
        return []
    return [
        f"parallel.pipeline {pipeline} stages need a block each, but model.layers is {layers}. "
        f"Nearest that fit: parallel.pipeline {layers}; or model.layers {pipeline}."
    ]


def _zero_under_a_pipeline(parallel: ParallelConfig) -> list[str]:
    if parallel.pipeline == 1 or parallel.zero == 1:
        return []
    why = (
        "a pipeline keeps the gradients of all its micro-batches until the end of the step"
        if parallel.zero > 1
        else "DeepSpeed clips by a wrong norm there"
    )
    return [
        f"parallel.zero {parallel.zero} does not go with parallel.pipeline {parallel.pipeline}: {why}. "
        "Nearest that fit: parallel.zero 1; or parallel.pipeline 1."
    ]


def _sequence_without_tensor(parallel: ParallelConfig) -> list[str]:
    if not parallel.sequence or parallel.tensor > 1:
        return []
    return [
        "parallel.sequence true splits tokens within a tensor-parallel group, but parallel.tensor is 1. "
        "Set parallel.tensor 2 or more, or parallel.sequence false."
    ]


def _units(parallel: ParallelConfig, world: int) -> str:
    tensors = [degree for degree in range(1, world + 1) if world % (degree * parallel.pipeline) == 0]
    stages = [degree for degree in range(1, world + 1) if world % (degree * parallel.tensor) == 0]
    options = [
        f"parallel.{name} {_listing(_around(getattr(parallel, name), fits))}"
        for name, fits in (("tensor", tensors), ("pipeline", stages))
        if fits
    ]
    return "; or ".join(options) if options else "parallel.tensor 1 and parallel.pipeline 1"


def _multiples(value: int, step: int) -> list[int]:
    return [number for number in (value // step * step, (value // step + 1) * step) if number]


def _around(value: int, fits: Iterable[int]) -> list[int]:
    """The nearest of `fits` below and above `value`."""
    below, above = [fit for fit in fits if fit < value], [fit for fit in fits if fit > value]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]


def _listing(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, numbers))


def _recheck_with_stages(config: RunConfig) -> list[str]:
    recheck, stages = config.launch.recheck, config.parallel.pipeline
    if stages == 1 or recheck in ("auto", 0):
        return []
    return [
        f"launch.recheck {recheck} with parallel.pipeline {stages}: micro-batches are computed a second time only "
        "where a replica has no stages. Set launch.recheck 0 (or auto), or parallel.pipeline 1."
    ]
