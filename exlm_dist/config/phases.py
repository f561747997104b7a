"""The phases of a run, and the rules between sources, phases and the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping

from exlm_dist.config.data_settings import Amount, PhaseConfig
from exlm_dist.config.schema import MaskingConfig, RunConfig

#: Names of sources: they stand in dotted settings and in names of metrics.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def phases_of(config: RunConfig) -> list[tuple[range, PhaseConfig]]:
    """The steps of each phase, from 0 to `schedule.steps`; a run without phases is one."""
    phases = config.phases or (PhaseConfig(),)
    found, first = [], 0
    for phase in phases[:-1]:
        found.append((range(first, first + phase.steps), phase))
        first += phase.steps
    return [*found, (range(first, config.schedule.steps), phases[-1])]


def amounts_of(config: RunConfig, phase: PhaseConfig) -> Mapping[str, Amount]:
    """What is read in a phase, by source."""
    return phase.sources or config.data.sources


def masking_of(config: RunConfig) -> MaskingConfig:
    """The masking of training, the ratios of the phases in its schedule."""
    masking, phases = config.masking, phases_of(config)
    if not any(phase.masking.ratio for _, phase in phases):
        return masking
    ratios = [phase.masking.ratio or masking.ratio for _, phase in phases]
    points = [
        (steps.start, ratio)
        for (steps, _), before, after in zip(phases[1:], ratios, ratios[1:])
        for ratio in (before, after)
    ]
    return masking.model_copy(update={"ratio": ratios[0], "schedule": tuple(points)})


def phase_problems(config: RunConfig) -> list[str]:
    """The rules between sources and phases that are broken."""
    data = config.data
    if data.path and data.sources:
        return ['data.path and data.sources are both given: leave out one (data.path "" where a base has it).']
    if not data.path and not data.sources:
        return ["data.path must be given: a folder of `exlm prepare` (or data.sources, to mix several)."]
    problems = [
        f"data.sources.{name}: a name of a source consists of letters, digits, - and _."
        for name in data.sources
        if not NAME.fullmatch(name)
    ]
    problems += _steps(config)
    if config.masking.schedule and any(phase.masking.ratio for phase in config.phases):
        problems.append("masking.schedule and a masking.ratio in phases both say the ratio: leave out one of them.")
    for number, (_, phase) in enumerate(phases_of(config)):
        where = f"phases.{number}.sources" if phase.sources else "data.sources"
        problems += [text for text in _amounts(config, phase, where) if text not in problems]
    return problems


def _steps(config: RunConfig) -> list[str]:
    """Whether the phases fill the run."""
    if not config.phases:
        return []
    *before, last = config.phases
    problems = [
        f"phases.{number}.steps must be given: only the last phase lasts until schedule.steps."
        for number, phase in enumerate(before)
        if not phase.steps
    ]
    if last.steps:
        problems.append(
            f"phases.{len(before)}.steps {last.steps}: leave it out, the last phase lasts until schedule.steps "
            f"{config.schedule.steps}."
        )
    if (first := sum(phase.steps for phase in before)) >= config.schedule.steps:
        problems.append(
            f"phases.{len(before)} would begin after step {first}, but schedule.steps is {config.schedule.steps}: set "
            f"that to more than {first}, or shorten the phases."
        )
    return problems


def _amounts(config: RunConfig, phase: PhaseConfig, where: str) -> list[str]:
    """Whether each source of a phase is known and has an amount."""
    known, amounts = config.data.sources, amounts_of(config, phase)
    problems = []
    for name, amount in amounts.items():
        if name not in known:
            listed = f"they are {', '.join(known)}" if known else "there are none, only data.path"
            problems.append(f"{where}.{name}: data.sources has no source of that name; {listed}.")
        if amount.weight and amount.epochs:
            problems.append(f"{where}.{name}: weight {amount.weight:g} and epochs {amount.epochs:g}: leave out one.")
        if not amount.weight and not amount.epochs and not phase.sources:
            problems.append(f"{where}.{name}: give it a weight or epochs, or name the sources in each of `phases`.")
    if amounts and not problems and not any(amount.weight for amount in amounts.values()):
        problems.append(f"{where}: give at least one source a weight: those with a weight fill what epochs leave.")
    return problems
