"""Rules between settings. Each error names both values and what would fit."""

from __future__ import annotations

import math
from pathlib import Path

from exlm_dist.config.layouts import data_degree, layout_problems
from exlm_dist.config.phases import masking_of, phase_problems
from exlm_dist.config.ratios import masking_problems
from exlm_dist.config.schema import ModelConfig, RunConfig
from exlm_dist.utils.checkpoint_names import newest_step
from exlm_dist.utils.errors import ConfigError


def check_config(config: RunConfig) -> None:
    """Raise ConfigError with every rule that the configuration breaks."""
    problems = [*_model(config.model), *_training(config), *layout_problems(config)]
    if problems:
        raise ConfigError("\n".join(problems))


def check_world(config: RunConfig, world: int) -> None:
    """Raise ConfigError if the layout does not fit `world` ranks, or its replicas do not divide the global batch."""
    check_division(config.batch.sequences, config.batch.micro, data_degree(config.parallel, world))


def check_init(config: RunConfig) -> None:
    """Raise ConfigError if a run that has no checkpoint yet is to start from weights that are not there."""
    if config.init and not Path(config.init).is_dir() and not newest_step(Path(config.runs) / config.name):
        raise ConfigError(
            f"init = {config.init!r}: there is no such folder (working folder {Path.cwd()}). Give a run folder "
            "(runs/NAME), a checkpoint in it, or a folder of exlm export hf."
        )


def check_division(sequences: int, micro: int, world: int) -> None:
    """Raise ConfigError unless world x micro divides the global batch, naming all three and the nearest values that do.
    `world`: data-parallel ranks."""
    group = world * micro
    if sequences % group == 0:
        return
    nearest = " or ".join(str(size) for size in (sequences // group * group, (sequences // group + 1) * group) if size)
    micros = [size for size in range(1, sequences // world + 1) if sequences % (world * size) == 0]
    fits = f"; or batch.micro {min(micros, key=lambda size: abs(size - micro))}" if micros else ""
    worlds = [ranks for ranks in range(1, sequences // micro + 1) if sequences % (ranks * micro) == 0]
    fits += f"; or {min(worlds, key=lambda ranks: abs(ranks - world))} data-parallel ranks" if worlds else ""
    raise ConfigError(
        f"batch.sequences {sequences} is not a multiple of {world} data-parallel ranks x batch.micro {micro} = "
        f"{group}. Nearest that fit: batch.sequences {nearest} (in a new run){fits}."
    )


def largest_num_masks(length: int, ratio: float) -> int:
    """The most masks that a sequence of `length` tokens (BOS and EOS not counted) can get."""
    return min(length, max(1, math.ceil(ratio * length)))


def longest_expansion(length: int, *, ratio: float, states: int, anchors: bool) -> int:
    """The most positions to which a sequence of `length` tokens (BOS and EOS counted) can expand."""
    expanded = largest_num_masks(max(length - 2, 1), ratio) + (2 if anchors else 0)
    return length + (states - 1) * expanded


def check_length(length: int, *, ratio: float, states: int, anchors: bool, max_positions: int) -> None:
    """Raise ConfigError if a sequence of `length` tokens (BOS and EOS counted) could expand past `max_positions`."""
    longest = longest_expansion(length, ratio=ratio, states=states, anchors=anchors)
    if longest > max_positions:
        raise ConfigError(
            f"sequences of up to {length} tokens expand to up to {longest} positions with a masking ratio of "
            f"{ratio:g} and model.states {states}, more than model.max_positions {max_positions}. Set "
            f"model.max_positions to {longest} or more, lower the masking ratio, or prepare the data with a smaller "
            "--max-length."
        )


def _model(model: ModelConfig) -> list[str]:
    problems = []
    if model.width % model.heads:
        fits = [
            heads for heads in range(1, model.width + 1) if model.width % heads == 0 and model.width // heads % 4 == 0
        ]
        near = min(fits, key=lambda heads: abs(heads - model.heads), default=None)
        problems.append(
            f"model.width {model.width} is not a multiple of model.heads {model.heads}. "
            f"Nearest that fits: model.heads {near}."
        )
    elif model.width // model.heads % 4:
        problems.append(
            f"model.width {model.width} / model.heads {model.heads} = head width {model.width // model.heads}, "
            "which must be divisible by 4 (2-D rotary: pairs of elements in each half). "
            f"Nearest: model.width {_nearest(model.width, 4 * model.heads)}."
        )
    if model.objective == "mlm" and (model.states != 1 or model.anchors):
        problems.append(
            f"model.objective mlm has one state per mask and no anchors, but model.states is {model.states} and "
            f"model.anchors {str(model.anchors).lower()}. Set model.states 1 and model.anchors false."
        )
    if model.jump_prior != "none" and (model.objective == "mlm" or model.transitions == "uniform"):
        without = "model.objective mlm" if model.objective == "mlm" else "model.transitions uniform"
        problems.append(
            f"model.jump_prior {model.jump_prior} is added to the scores of learned transitions, and {without} has "
            "none. Set model.jump_prior none."
        )
    return problems


def _training(config: RunConfig) -> list[str]:
    problems = [*phase_problems(config), *masking_problems(masking_of(config))]
    copies, schedule, batch = config.masking.copies, config.schedule, config.batch
    if copies > 1 and config.model.objective != "mlm":
        problems.append(f"masking.copies {copies} needs model.objective mlm: set that, or masking.copies 1.")
    if schedule.warmup >= schedule.steps:
        problems.append(f"schedule.warmup {schedule.warmup} must be smaller than schedule.steps {schedule.steps}.")
    if batch.sequences % batch.micro:
        problems.append(
            f"batch.sequences {batch.sequences} is not a multiple of batch.micro {batch.micro}. "
            f"Nearest: batch.sequences {_nearest(batch.sequences, batch.micro)}."
        )
    return problems


def _nearest(value: int, step: int) -> int:
    return max(step, round(value / step) * step)
