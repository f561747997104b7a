"""Which source is read where: true to the weights at every position, the same however it is asked, and frozen."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_run import make_config, with_sources

from exlm_dist.config import RunConfig
from exlm_dist.data.mixed_order import MixedOrder
from exlm_dist.data.mixture import LARGEST, Mixture, Part, whole_weights
from exlm_dist.data.order import Order
from exlm_dist.utils.errors import ConfigError

WEIGHTS = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)


def mixed(sources: dict[str, Any], steps: int, phases: Sequence[Any] = (), **data: Any) -> RunConfig:
    """A run of 8 sequences a step over sources of these amounts."""
    named = {name: {"path": f"data/{name}", **amount} for name, amount in sources.items()}
    return with_sources(make_config(Path("runs"), "run", Path(), schedule={"steps": steps}), named, phases, **data)


def simulated(weights: list[int], count: int) -> tuple[list[int], list[int]]:
    """The same by going through all positions, with a counter for each source."""
    by_size = sorted((source for source, weight in enumerate(weights) if weight), key=lambda one: -weights[one])
    passed, read = [0] * len(weights), [0] * len(weights)
    sources, ordinals = [], []
    for _ in range(count):
        rest = sum(weights)
        for source in by_size:
            passed[source] += 1
            wanted = Fraction(passed[source] * weights[source], rest)
            if int(wanted + Fraction(rest // 2, rest)) > read[source]:
                sources.append(source)
                ordinals.append(read[source])
                read[source] += 1
                break
            rest -= weights[source]
    return sources, ordinals


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.integers(1, 400))
def test_the_closed_form_is_what_counting_gives(weights, count):
    sources, ordinals = Mixture((Part(0, tuple(weights)),)).at(np.arange(count))
    assert (sources.tolist(), ordinals.tolist()) == simulated(weights, count)


@settings(max_examples=60, deadline=None)
@given(WEIGHTS)
def test_after_any_number_of_positions_each_source_was_read_as_its_weight_says(weights):
    total = sum(weights)
    mixture = Mixture((Part(0, tuple(weights)),))
    sources, _ = mixture.at(np.arange(2 * total))
    counts = np.cumsum(sources[:, None] == np.arange(len(weights)), 0)
    exact = np.arange(1, 2 * total + 1)[:, None] * np.array(weights) / total
    read = sum(map(bool, weights))
    bound = (1 + sum(1 / n for n in range(1, read - 1))) / 2
    assert np.abs(counts - exact).max() <= bound + 1e-9
    assert counts[total - 1].tolist() == weights and counts[-1].tolist() == [2 * weight for weight in weights]
    for position in (0, 1, total // 2, total, 2 * total):
        assert mixture.counts(position).tolist() == np.bincount(sources[:position], minlength=len(weights)).tolist()


def test_golden_mixture():
    sources, ordinals = Mixture((Part(0, (3, 1, 0)), Part(6, (1, 2, 2)))).at(np.arange(16))
    assert sources.tolist() == [0, 0, 1, 0, 0, 0, 2, 1, 0, 1, 2, 2, 1, 0, 1, 2]
    assert ordinals.tolist() == [0, 1, 0, 2, 3, 4, 0, 1, 5, 2, 1, 2, 3, 6, 4, 3]
    sources, ordinals = Mixture((Part(0, (5, 100, 31)),)).at(10**15 + np.arange(8))
    assert sources.tolist() == [1, 2, 1, 1, 1, 2, 1, 1]
    assert (ordinals - ordinals[[0, 1]][[0, 1, 0, 0, 0, 1, 0, 0]]).tolist() == [0, 0, 1, 2, 3, 1, 4, 5]
    assert ordinals[:2].tolist() == [735294117647059, 227941176470588]
    phases = [{"steps": 1, "sources": {"a": 3, "b": 1}}, {"sources": {"a": 1, "b": 2, "c": 2}}]
    config = mixed(dict.fromkeys("abc", {}), 20, phases).model_copy(update={"seed": 7})
    epochs, samples = MixedOrder.of(config, [10, 4, 5]).at(np.arange(20))
    assert epochs.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 1]
    assert samples.tolist() == [7, 4, 10, 2, 9, 6, 12, 1, 17, 11, 0, 13, 18, 15, 12, 5, 10, 16, 14, 13]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(20, 90), min_size=3, max_size=3),
    st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any), min_size=1, max_size=4),
    st.lists(st.integers(0, 400), min_size=1, max_size=30),
    st.sampled_from([{}, {"shuffle": "windows", "block": 7, "window": 3}]),
    st.integers(0, 99),
)
def test_every_sample_once_in_each_epoch_of_its_source_and_the_same_wherever_one_begins(
    sizes, weights, positions, data, seed
):
    """The stream across phases, from 0 and from anywhere; epochs go on from one phase to the next."""
    names = ["a", "b", "c"]
    phases = [{"steps": 11, "sources": dict(zip(names, row))} for row in weights]
    phases[-1]["steps"] = 0
    config = mixed(dict.fromkeys(names, {}), 120, phases, **data).model_copy(update={"seed": seed})
    order = MixedOrder.of(config, sizes)
    epochs, samples = order.at(np.arange(401))
    alone = order.at(np.array(positions))
    assert np.array_equal(alone[0], epochs[positions]) and np.array_equal(alone[1], samples[positions])
    first = 0
    for source, size in enumerate(sizes):
        here = (samples >= first) & (samples < first + size)
        assert here.sum() == order.mixture.counts(401)[source]
        own, epoch = samples[here] - first, epochs[here]
        assert epoch.tolist() == [number // size for number in range(len(own))]
        for start in range(0, len(own), size):
            assert len(set(own[start : start + size].tolist())) == len(own[start : start + size])
        first += size


def test_a_single_source_has_the_order_that_it_has_without_a_mixture():
    positions = np.array([0, 1, 5, 99, 12345, 10**12])
    for data in ({}, {"shuffle": "windows", "block": 8, "window": 4}):
        config = mixed({"a": {"weight": 0.3}}, 10, **data)
        order, alone = MixedOrder.of(config, [1000]), Order.of(config.data, config.seed, 1000)
        assert all(np.array_equal(one, other) for one, other in zip(order.at(positions), alone.at(positions)))
        if alone.block:
            near = np.arange(200, 264)
            assert order.upcoming(near) == alone.upcoming(near)


def test_sources_of_one_size_are_not_read_in_step():
    order = MixedOrder.of(mixed({"a": {"weight": 1}, "b": {"weight": 1}}, 10), [100, 100])
    _, samples = order.at(np.arange(200))
    own = [samples[samples < 100], samples[samples >= 100] - 100]
    assert (own[0] == own[1]).sum() < 8


def test_positions_far_away_neither_overflow_nor_cost_more():
    far = 7 * 10**14 + np.arange(1000)
    weights = (LARGEST - 3, 2, 1)
    mixture = Mixture((Part(0, weights),))
    sources, ordinals = mixture.at(far)
    assert (np.diff(ordinals[sources == 0]) == 1).all() and ordinals[0] == mixture.counts(int(far[0]))[sources[0]]
    assert abs(mixture.counts(int(far[0]))[0] - far[0] * Fraction(weights[0], LARGEST)) <= 1


@pytest.mark.parametrize(
    "fractions, whole",
    [
        ([Fraction(3), Fraction(1)], (3, 1)),
        ([Fraction("0.7"), Fraction("0.2"), Fraction("0.1")], (7, 2, 1)),
        ([Fraction(2), Fraction(0), Fraction(4)], (1, 0, 2)),
        ([Fraction(5)], (1,)),
        ([Fraction(10**12), Fraction(1)], (LARGEST - 2, 1)),
    ],
)
def test_weights_become_the_smallest_whole_numbers(fractions, whole):
    found = whole_weights(fractions)
    assert sum(found) <= LARGEST and all(abs(one - other) <= 2 for one, other in zip(found, whole))
    if sum(whole) < 100:
        assert found == whole


def test_epochs_are_passes_over_the_source_in_the_phase_and_weights_fill_the_rest():
    config = mixed({"a": {"epochs": 2}, "b": {"weight": 1}, "c": {"weight": 3}}, 100)
    assert Mixture.of(config, [50, 10**6, 10**6]).counts(800).tolist() == [100, 175, 525]
    phases = [{"steps": 60, "sources": {"b": 1}}, {"sources": {"a": {"epochs": 1.5}, "b": 0.1}}]
    mixture = Mixture.of(mixed(dict.fromkeys("abc", {}), 100, phases), [50, 30, 10])
    assert mixture.counts(480).tolist() == [0, 480, 0] and mixture.counts(800).tolist() == [75, 725, 0]
    with pytest.raises(ConfigError, match=r"The run has 800 sequences.*\(2 x 400 of a\)"):
        Mixture.of(config, [400, 10, 10])
    with pytest.raises(ConfigError, match=r"phases.1 has 320 sequences.*\(1.5 x 300 of a\)"):
        Mixture.of(mixed(dict.fromkeys("abc", {}), 100, phases), [300, 30, 10])


def test_mixtures_begin_alike_up_to_where_they_differ():
    short = Mixture((Part(0, (3, 1)), Part(80, (1, 1))))
    later = Mixture((Part(0, (3, 1, 0)), Part(80, (1, 1, 0)), Part(160, (0, 0, 1))))
    assert short.begins_as(later, 160) and not short.begins_as(later, 161)
    assert later.begins_as(Mixture((Part(0, (3, 1)),)), 80) and not later.begins_as(Mixture((Part(0, (3, 2)),)), 1)
    assert Mixture((Part(0, (1,)),)).begins_as(Mixture((Part(0, (1, 0)), Part(8, (1, 1)))), 8)
    alone = make_config(Path("runs"), "run", Path("data"))
    assert Mixture.of(alone, [5]) == Mixture.of(mixed({"a": {"weight": 2}}, 9), [5]) == Mixture((Part(0, (1,)),))


def test_a_phase_with_the_weights_of_the_one_before_changes_nothing():
    phases = [{"steps": 3, "masking": {"ratio": 0.3}}, {"steps": 4}, {"sources": {"a": 6, "b": 2}}]
    config = mixed({"a": {"weight": 3}, "b": {"weight": 1}}, 20, phases)
    assert Mixture.of(config, [5, 5]) == Mixture((Part(0, (3, 1)),))
