"""Rules between settings. Each refusal names both numbers and what would fit."""

from __future__ import annotations

from exlm_dist.config.schema import ModelConfig, RunConfig
from exlm_dist.utils.errors import ConfigError


def check_config(config: RunConfig) -> None:
    """Raise ConfigError listing every rule the configuration breaks."""
    problems = [*_model(config.model), *_training(config), *_parallel(config)]
    if problems:
        raise ConfigError("\n".join(problems))


def check_world(config: RunConfig, world: int) -> None:
    """Raise ConfigError where `world` data-parallel ranks cannot share the global batch equally."""
    group = world * config.batch.micro
    total = config.batch.sequences
    if total % group == 0:
        return
    lower, upper = total // group * group, (total // group + 1) * group
    micros = [micro for micro in range(config.batch.micro, 0, -1) if total % (world * micro) == 0]
    fits = f"; or batch.micro {micros[0]}" if micros else ""
    nearest = f"{lower} or {upper}" if lower else f"{upper}"
    raise ConfigError(f"batch.sequences {total} is not a multiple of {world} ranks x batch.micro {config.batch.micro} = {group}. "
                      f"Nearest that fit: batch.sequences {nearest}{fits}.")


def longest_expansion(length: int, config: RunConfig) -> int:
    """Largest expanded length of a sequence of `length` tokens (BOS and EOS counted) under the masking of `config`."""
    payload = max(length - 2, 1)
    ratio = max(config.masking.ratio, config.masking.eval_ratio)
    masked = min(payload, int(ratio * payload) + 1)
    expanded = masked + (2 if config.model.anchors else 0)
    return length + (config.model.states - 1) * expanded


def check_length(config: RunConfig, length: int) -> None:
    """Raise ConfigError where sequences of `length` tokens could expand past `model.max_positions`."""
    longest = longest_expansion(length, config)
    if longest > config.model.max_positions:
        raise ConfigError(f"sequences of up to {length} tokens expand to up to {longest} states with masking.ratio "
                          f"{config.masking.ratio} and model.states {config.model.states}, more than model.max_positions "
                          f"{config.model.max_positions}. Set model.max_positions to {longest} or more, or prepare with a smaller --max-length.")


def _model(model: ModelConfig) -> list[str]:
    problems = []
    if model.width % model.heads:
        fits = [heads for heads in range(1, model.width + 1) if model.width % heads == 0 and model.width // heads % 4 == 0]
        near = min(fits, key=lambda heads: abs(heads - model.heads), default=None)
        problems.append(f"model.width {model.width} is not a multiple of model.heads {model.heads}. Nearest that fits: model.heads {near}.")
    elif model.width // model.heads % 4:
        problems.append(f"model.width {model.width} / model.heads {model.heads} = head width {model.width // model.heads}, which must be divisible "
                        f"by 4 (2-D rotary turns two halves in pairs). Nearest: model.width {_nearest(model.width, 4 * model.heads)}.")
    if model.objective == "mlm" and (model.states != 1 or model.anchors):
        problems.append(f"model.objective mlm has one state per mask and no anchors, but model.states is {model.states} and model.anchors "
                        f"{str(model.anchors).lower()}. Set model.states 1 and model.anchors false.")
    return problems


def _training(config: RunConfig) -> list[str]:
    problems = []
    masking, schedule, batch = config.masking, config.schedule, config.batch
    if masking.keep + masking.random > 1:
        problems.append(f"masking.keep {masking.keep} + masking.random {masking.random} is more than 1.")
    if schedule.warmup >= schedule.steps:
        problems.append(f"schedule.warmup {schedule.warmup} must be smaller than schedule.steps {schedule.steps}.")
    if batch.sequences % batch.micro:
        problems.append(f"batch.sequences {batch.sequences} is not a multiple of batch.micro {batch.micro}. "
                        f"Nearest: batch.sequences {_nearest(batch.sequences, batch.micro)}.")
    return problems


def _parallel(config: RunConfig) -> list[str]:
    degrees = {"tensor": config.parallel.tensor, "pipeline": config.parallel.pipeline}
    return [f"parallel.{name} {degree}: this version trains with data parallelism and ZeRO only. Set parallel.{name} 1."
            for name, degree in degrees.items() if degree > 1]


def _nearest(value: int, step: int) -> int:
    return max(step, round(value / step) * step)
