"""The order of samples: a bijection in every epoch, frozen values, and no pattern that a model could notice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exlm_dist.data.counter_rng import hash_of, mix, words_at
from exlm_dist.data.order import permute, sample_at


def test_splitmix64_gives_its_published_values() -> None:
    words = words_at(np.array([1234567], np.uint64), np.arange(5))
    assert words.tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_hash_is_frozen_and_depends_on_each_part_and_their_order() -> None:
    assert hash_of(1, 2, 3).tolist() == [0xEABCFA2C623C5A59]
    values = [int(hash_of(*parts)[0]) for parts in ((1, 2, 3), (1, 3, 2), (2, 2, 3), (1, 2), (0, 1, 2), (1, 2, 0))]
    assert len(set(values)) == len(values)
    assert hash_of(5, np.arange(4), 1).tolist() == [int(hash_of(5, part, 1)[0]) for part in range(4)]


def test_mix_flips_half_of_the_bits() -> None:
    words = np.arange(500, dtype=np.uint64)
    for bit in (0, 17, 63):
        flipped = mix(words) ^ mix(words ^ np.uint64(1 << bit))
        fraction = np.unpackbits(flipped.view(np.uint8)).mean()
        assert abs(fraction - 0.5) < 0.02


@pytest.mark.parametrize(
    ("seed", "epoch", "num", "indices", "expected"),
    [
        (0, 0, 10, range(10), [1, 0, 9, 2, 6, 3, 8, 4, 5, 7]),
        (0, 1, 10, range(10), [7, 6, 1, 9, 0, 4, 2, 5, 8, 3]),
        (7, 0, 10, range(10), [7, 4, 2, 9, 6, 1, 0, 5, 3, 8]),
        (1, 3, 10**9, [0, 1, 2, 999_999_999], [306446009, 85893244, 530706615, 199665165]),
        (2**63 - 1, 5, 2**40 + 1, range(3), [576910328837, 954975195793, 689042239418]),
    ],
)
def test_golden_order(seed: int, epoch: int, num: int, indices: list[int], expected: list[int]) -> None:
    assert permute(np.array(indices), seed, epoch, num).tolist() == expected


@given(st.integers(1, 700), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_every_epoch_is_a_bijection(num: int, seed: int, epoch: int) -> None:
    epochs, samples = sample_at(np.arange(num * epoch, num * (epoch + 1)), seed, num)
    assert (epochs == epoch).all()
    assert np.array_equal(np.sort(samples), np.arange(num))


@given(st.integers(1, 2**40), st.integers(0, 2**63 - 1), st.lists(st.integers(0, 2**50), min_size=1, max_size=20))
def test_a_position_means_the_same_whatever_is_asked_beside_it(num: int, seed: int, positions: list[int]) -> None:
    epochs, samples = sample_at(np.array(positions), seed, num)
    assert ((samples >= 0) & (samples < num)).all()
    for position, epoch, sample in zip(positions, epochs, samples):
        alone = sample_at(np.array([position]), seed, num)
        assert (alone[0][0], alone[1][0]) == (epoch, sample) and epoch == position // num


@pytest.mark.parametrize("num", [1000, 10_007, 65_536])
def test_neighbours_and_epochs_are_unrelated(num: int) -> None:
    indices = np.arange(num)
    order = permute(indices, 3, 2, num)
    bound = 4 / np.sqrt(num)
    assert abs(np.corrcoef(order, indices)[0, 1]) < bound
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < bound
    assert (np.abs(np.diff(order)) == 1).sum() <= 10, "two are expected"
    for other in (permute(indices, 3, 3, num), permute(indices, 4, 2, num)):
        assert (order == other).sum() <= 8, "one is expected"
        assert abs(np.corrcoef(order, other)[0, 1]) < bound


@pytest.mark.parametrize("num", [2, 3, 5, 8, 12])
def test_every_sample_is_as_likely_at_every_position(num: int) -> None:
    epochs = 2000
    _, samples = sample_at(np.arange(epochs * num), 11, num)
    table = np.zeros((num, num))
    np.add.at(table, (np.tile(np.arange(num), epochs), samples), 1)
    freedom = (num - 1) ** 2
    chi_square = ((table - epochs / num) ** 2).sum() / (epochs / num)
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_no_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        sample_at(np.arange(3), 0, 0)
