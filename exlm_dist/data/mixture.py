"""Which source is read at which position of a mixture, and which of its samples: a pure function without tables.

The sources of a phase are taken off one after another, the largest first: of the first q places that are left, a source
with weight w of a rest R has N(q) = floor((q w + floor(R / 2)) / R), q w / R rounded. Place q is its own if N(q + 1) >
N(q), and then N(q) says which of its samples it is; else the place is number q - N(q) for the sources after it. The
last source has what is left. So after any number of positions, not only after whole batches, each source has been read
as often as its weight says, but for one sample at most with up to three sources, two with up to ten (with S sources
(1 + 1/1 + 1/2 + ... + 1/(S - 2)) / 2). A single source is read as it would be without any mixture.

Weights are whole numbers with sum T. What stands at q + T is what stands at q, of every source as many samples further
as its weight is: positions are reduced modulo T first, and no product exceeds 64 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import numpy as np

from exlm_dist.config.data_settings import Amount
from exlm_dist.config.phases import amounts_of, phases_of
from exlm_dist.config.schema import RunConfig
from exlm_dist.utils.errors import ConfigError

#: The largest sum of weights: squares of it are below 2^62.
LARGEST = 1 << 31


@dataclass(frozen=True)
class Part:
    """Positions from `first` to the next part, that belong to sources with these whole weights. 0: it is not read."""

    first: int
    weights: tuple[int, ...]


@dataclass(frozen=True)
class Mixture:
    """Parts, the first from position 0; all have a weight for each source."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, config: RunConfig, sizes: Sequence[int]) -> Mixture:
        """The mixture of a run over sources with so many samples each, in the order of `data.sources`; of one source
        where there is but `data.path`. ConfigError for a phase too short for the epochs it is to have."""
        parts: list[Part] = []
        for number, (steps, phase) in enumerate(phases_of(config)):
            weights: tuple[int, ...] = (1,)
            if config.data.sources:
                named = dict(zip(config.data.sources, sizes, strict=True))
                total = len(steps) * config.batch.sequences
                where = f"phases.{number}" if config.phases else "The run"
                weights = whole_weights(_fractions(amounts_of(config, phase), named, total, where))
            if not parts or parts[-1].weights != weights:  # the same ones again: nothing changes
                parts.append(Part(steps.start * config.batch.sequences, weights))
        return cls(tuple(parts))

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source int64[m], how many of its samples were read before int64[m]) of each global position (int64[m])."""
        positions = np.asarray(positions, np.int64)
        sources, ordinals = np.empty_like(positions), np.empty_like(positions)
        part_of = np.searchsorted([part.first for part in self.parts], positions, side="right") - 1
        for index in np.unique(part_of).tolist():
            part, here = self.parts[index], part_of == index
            sources[here], places = _taken(positions[here] - part.first, part.weights)
            ordinals[here] = self.counts(part.first)[sources[here]] + places
        return sources, ordinals

    def counts(self, position: int) -> np.ndarray:
        """int64[S]: samples of each source among the first `position` positions."""
        ends = [part.first for part in self.parts[1:]] + [position]
        counts = np.zeros(len(self.parts[0].weights), np.int64)
        for part, end in zip(self.parts, ends):
            if part.first < position:
                counts += _counted(min(end, position) - part.first, part.weights)
        return counts

    def begins_as(self, other: Mixture, position: int) -> bool:
        """Whether both read the same at all positions before this one. A mixture may have sources more, at the end,
        which are not read before."""
        mine, theirs = (
            [(part.first, _stripped(part.weights)) for part in one.parts if part.first < position]
            for one in (self, other)
        )
        return mine == theirs


def whole_weights(fractions: Sequence[Fraction]) -> tuple[int, ...]:
    """The smallest whole numbers in the proportions of `fractions`; if their sum is beyond `LARGEST`, about these."""
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * scale) for fraction in fractions]
    divisor = math.gcd(*whole)
    whole = [weight // divisor for weight in whole]
    total = sum(whole)
    if total > LARGEST:
        room = LARGEST - len(whole)
        whole = [max(1, weight * room // total) if weight else 0 for weight in whole]
        return whole_weights([Fraction(weight) for weight in whole])
    return tuple(whole)


def _fractions(amounts: Mapping[str, Amount], sizes: Mapping[str, int], total: int, where: str) -> list[Fraction]:
    """What is read of each source of `sizes` in the `total` sequences of a phase, as exact as it was written."""
    taken = {name: _exact(amount.epochs) * sizes[name] for name, amount in amounts.items() if amount.epochs}
    rest = total - sum(taken.values(), Fraction(0))
    if rest <= 0:
        listed = ", ".join(f"{amounts[name].epochs:g} x {sizes[name]:,} of {name}" for name in taken)
        raise ConfigError(
            f"{where} has {total:,} sequences, steps x batch.sequences: too few for the epochs that are asked for "
            f"({listed}) and the sources with a weight. Give it more steps, or fewer epochs."
        )
    weights = {name: _exact(amount.weight) for name, amount in amounts.items() if amount.weight}
    sum_of_weights = sum(weights.values(), Fraction(0))
    found = taken | {name: rest * weight / sum_of_weights for name, weight in weights.items()}
    return [found.get(name, Fraction(0)) for name in sizes]


def _exact(number: float) -> Fraction:
    """The number as it is written: 0.1 is a tenth."""
    return Fraction(Decimal(repr(number)))


def _stripped(weights: tuple[int, ...]) -> tuple[int, ...]:
    """Weights without the zeros at the end."""
    return weights[: max(index for index, weight in enumerate(weights) if weight) + 1]


def _by_size(weights: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(source, weight, what is left with it) of the sources that are read, the largest first."""
    found, rest = [], sum(weights)
    for source in sorted(range(len(weights)), key=lambda source: -weights[source]):
        if weights[source]:
            found.append((source, weights[source], rest))
            rest -= weights[source]
    return found


def _taken(positions: np.ndarray, weights: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(source, its samples before) int64[m] at positions int64[m] of an endless part."""
    rounds, places = np.divmod(positions, sum(weights))
    sources, ordinals = np.empty_like(positions), np.empty_like(positions)
    left = np.arange(len(positions))
    for source, weight, rest in _by_size(weights):
        before = (places * weight + rest // 2) // rest
        mine = ((places + 1) * weight + rest // 2) // rest > before
        rows = left[mine]
        sources[rows], ordinals[rows] = source, rounds[rows] * weight + before[mine]
        left, places = left[~mine], (places - before)[~mine]
    return sources, ordinals


def _counted(position: int, weights: tuple[int, ...]) -> np.ndarray:
    """int64[S]: samples of each source among the first `position` positions of an endless part."""
    rounds, place = divmod(position, sum(weights))
    counts = rounds * np.array(weights, np.int64)
    for source, weight, rest in _by_size(weights):
        before = (place * weight + rest // 2) // rest
        counts[source] += before
        place -= before
    return counts
