"""The order of samples: a bijection in every epoch, frozen values, and no pattern that a model could notice."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exlm_dist.data.counter_rng import PURPOSE_ORDER, hash_of, mix, words_at
from exlm_dist.data.order import Order, permute


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
    assert permute(np.array(indices), num, PURPOSE_ORDER, seed, epoch).tolist() == expected
    assert Order(seed, num).at(np.array(indices) + epoch * num)[1].tolist() == expected


@pytest.mark.parametrize(
    ("seed", "num", "block", "window", "positions", "expected"),
    [
        (0, 10, 3, 2, range(10), [4, 3, 8, 5, 6, 7, 0, 2, 1, 9]),
        (0, 10, 3, 2, range(10, 20), [6, 5, 3, 4, 7, 8, 2, 1, 0, 9]),
        (7, 12, 2, 4, range(12), [2, 8, 6, 7, 3, 9, 5, 11, 4, 10, 1, 0]),
        (1, 10**9, 512, 1024, [0, 1, 2, 999_999_999], [597085015, 948451668, 898127637, 674879672]),
        (1, 10**9, 512, 1024, [7_123_456_789], [835154482]),
    ],
)
def test_golden_order_in_windows(
    seed: int, num: int, block: int, window: int, positions: list[int], expected: list[int]
) -> None:
    assert Order(seed, num, block, window).at(np.array(positions))[1].tolist() == expected


SIZES, SEEDS, BLOCKS = st.integers(1, 300), st.integers(0, 2**63 - 1), st.integers(0, 120)


@settings(max_examples=40, deadline=None)
@given(SIZES, SEEDS, st.integers(0, 1000), BLOCKS, st.integers(1, 9))
def test_every_epoch_is_a_bijection(num: int, seed: int, epoch: int, block: int, window: int) -> None:
    epochs, samples = Order(seed, num, block, window).at(np.arange(num * epoch, num * (epoch + 1)))
    assert (epochs == epoch).all()
    assert np.array_equal(np.sort(samples), np.arange(num))


@settings(max_examples=40, deadline=None)
@given(SIZES, SEEDS, st.integers(1, 120), st.integers(1, 9))
def test_few_blocks_are_in_use_at_a_time(num: int, seed: int, block: int, window: int) -> None:
    _, samples = Order(seed, num, block, window).at(np.arange(num))
    in_use = np.zeros(num + 1, np.int64)
    for one in range(-(-num // block)):
        places = np.flatnonzero(samples // block == one)
        in_use[places[0]] += 1
        in_use[places[-1] + 1] -= 1
    assert np.cumsum(in_use).max() <= window


@given(
    st.integers(1, 2**40),
    SEEDS,
    st.lists(st.integers(0, 2**50), min_size=1, max_size=20),
    st.integers(0, 5000),
    st.integers(1, 500),
)
@example(68_540_031_613, 0, [269_138_247], 1, 1)  # windows x blocks is beyond int64
def test_a_position_means_the_same_whatever_is_asked_beside_it(
    num: int, seed: int, positions: list[int], block: int, window: int
) -> None:
    order = Order(seed, num, block, window)
    epochs, samples = order.at(np.array(positions))
    assert ((samples >= 0) & (samples < num)).all()
    for position, epoch, sample in zip(positions, epochs, samples):
        alone = order.at(np.array([position]))
        assert (alone[0][0], alone[1][0]) == (epoch, sample) and epoch == position // num


@pytest.mark.parametrize("num", [1000, 10_007, 65_536])
def test_neighbours_and_epochs_are_unrelated(num: int) -> None:
    indices = np.arange(num)
    order = permute(indices, num, 3, 2)
    bound = 4 / np.sqrt(num)
    assert abs(np.corrcoef(order, indices)[0, 1]) < bound
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < bound
    assert (np.abs(np.diff(order)) == 1).sum() <= 10, "two are expected"
    for other in (permute(indices, num, 3, 3), permute(indices, num, 4, 2)):
        assert (order == other).sum() <= 8, "one is expected"
        assert abs(np.corrcoef(order, other)[0, 1]) < bound


@pytest.mark.parametrize(("num", "block"), [(2, 0), (3, 0), (5, 0), (8, 0), (12, 0), (7, 3), (8, 4)])
def test_every_sample_is_as_likely_at_every_position(num: int, block: int) -> None:
    epochs = 2000
    _, samples = Order(11, num, block, 3).at(np.arange(epochs * num))
    table = np.zeros((num, num))
    np.add.at(table, (np.tile(np.arange(num), epochs), samples), 1)
    freedom = (num - 1) ** 2
    chi_square = ((table - epochs / num) ** 2).sum() / (epochs / num)
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_no_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        Order(0, 0)
