"""Masks: frozen values, pure in the sample, uniform, and in the fractions that were asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exlm_dist.config import largest_num_masks
from exlm_dist.data.masking import Masks, choose_masked, mask_batch, num_masks, sample_keys
from exlm_dist.tokenizers.tokenizer import MASK, NUM_SPECIAL
from exlm_dist.utils.errors import DataError

LENGTHS = np.array([20, 7, 33])
KEYS = sample_keys(42, np.array([0, 0, 1]), np.array([0, 1, 0]))


def per_sequence(masks: Masks, lengths: np.ndarray) -> list[tuple[list[int], list[int]]]:
    """(masked positions, what the model sees there) of each sequence."""
    starts, edges = np.cumsum(lengths) - lengths, np.concatenate([[0], np.cumsum(masks.counts)])
    return [
        ((masks.indices[first:last] - start).tolist(), masks.visible[first:last].tolist())
        for start, first, last in zip(starts, edges, edges[1:])
    ]


def many(length: int, count: int, **settings: float) -> tuple[Masks, np.ndarray]:
    """Masks of `count` samples of one length, and their tokens."""
    lengths = np.full(count, length)
    tokens = np.random.default_rng(0).integers(NUM_SPECIAL, 100, length * count)
    keys = sample_keys(1, np.zeros(count, np.int64), np.arange(count))
    return mask_batch(tokens, lengths, keys, vocab_size=100, **settings), tokens


def test_golden_masks() -> None:
    assert KEYS.tolist() == [0x6310BF04D8207F46, 0xA475DB99D192C121, 0x2CE02C4EE4D2EA09]
    counts = num_masks(LENGTHS, KEYS, 0.15)
    assert counts.tolist() == [3, 1, 5]
    assert choose_masked(LENGTHS, counts, KEYS).tolist() == [7, 14, 19, 24, 27, 50, 51, 55, 56]


GOLDEN_INDICES = [3, 4, 7, 9, 10, 14, 15, 19, 24, 25, 27, 30, 34, 35, 44, 49, 50, 51, 53, 55, 56, 58, 59]
GOLDEN_VISIBLE = [
    103,
    104,
    185,
    12,
    421,
    390,
    131,
    4,
    399,
    169,
    142,
    4,
    4,
    135,
    144,
    4,
    150,
    114,
    101,
    155,
    4,
    490,
    16,
]


def test_golden_corruption() -> None:
    masks = mask_batch(np.arange(60) + 100, LENGTHS, KEYS, ratio=0.4, keep=0.3, random=0.3, vocab_size=500)
    assert masks.counts.tolist() == [8, 2, 13]
    assert masks.indices.tolist() == GOLDEN_INDICES
    assert masks.visible.tolist() == GOLDEN_VISIBLE


@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=12),
    st.floats(0.01, 0.99),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
    st.integers(0, 2**63 - 1),
)
def test_masks_are_those_of_each_sample_alone(
    lengths: list[int], ratio: float, keep: float, random: float, seed: int
) -> None:
    sizes = np.array(lengths)
    tokens = np.random.default_rng(0).integers(NUM_SPECIAL, 64, sizes.sum())
    keys = sample_keys(seed, np.arange(len(sizes)) % 3, np.arange(len(sizes)))
    settings = {"ratio": ratio, "keep": keep, "random": random, "vocab_size": 64}
    whole = mask_batch(tokens, sizes, keys, **settings)
    assert whole.counts.sum() == len(whole.indices) == len(whole.visible)
    starts = np.cumsum(sizes) - sizes
    for row, found in enumerate(per_sequence(whole, sizes)):
        one = slice(row, row + 1)
        payload = tokens[starts[row] : starts[row] + sizes[row]]
        alone = mask_batch(payload, sizes[one], keys[one], **settings)
        assert found == (alone.indices.tolist(), alone.visible.tolist())
        positions, visible = found
        assert positions == sorted(set(positions)) and 0 <= positions[0] and positions[-1] < sizes[row]
        assert max(1, int(ratio * sizes[row])) <= len(positions) <= largest_num_masks(int(sizes[row]), ratio)
        assert all(token == MASK or NUM_SPECIAL <= token < 64 for token in visible)


@pytest.mark.parametrize(("length", "ratio"), [(1, 0.15), (3, 0.15), (44, 0.15), (40, 0.99), (5, 0.2)])
def test_mean_number_of_masks_is_the_ratio(length: int, ratio: float) -> None:
    masks, _ = many(length, 4000, ratio=ratio)
    expected = max(1.0, ratio * length)
    assert abs(masks.counts.mean() - expected) < 0.05 and masks.counts.max() <= largest_num_masks(length, ratio)


def test_masked_positions_are_uniform_and_unrelated() -> None:
    length, count = 30, 6000
    masks, _ = many(length, count, ratio=0.2)
    chosen = np.zeros((count, length))
    chosen.reshape(-1)[masks.indices] = 1
    fraction = chosen.mean(0)
    assert np.abs(fraction - 0.2).max() < 5 * np.sqrt(0.2 * 0.8 / count)
    relation = np.corrcoef(chosen.T)[~np.eye(length, dtype=bool)]
    assert np.abs(relation - -1 / (length - 1)).max() < 5 / np.sqrt(count), "without replacement: -1/(n-1)"
    neighbours = np.corrcoef(chosen[1:].reshape(-1), chosen[:-1].reshape(-1))[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(chosen.size), "samples with neighbouring ids"


def test_fractions_of_kept_and_random_tokens() -> None:
    masks, tokens = many(50, 4000, ratio=0.3, keep=0.1, random=0.2)
    originals = tokens[masks.indices]
    kept, hidden = masks.visible == originals, masks.visible == MASK
    chance = 0.2 / (100 - NUM_SPECIAL)  # a random token that happens to be the original
    assert abs(hidden.mean() - 0.7) < 0.01 and abs(kept.mean() - 0.1 - chance) < 0.01
    drawn = masks.visible[~kept & ~hidden]
    frequency = np.bincount(drawn, minlength=100)[NUM_SPECIAL:] / len(drawn)
    assert frequency.min() > 0 and np.abs(frequency * len(frequency) - 1).max() < 0.35
    assert drawn.min() >= NUM_SPECIAL


def test_epochs_seeds_and_samples_mask_differently() -> None:
    lengths = np.full(1, 60)
    found = [
        choose_masked(lengths, np.array([9]), sample_keys(seed, np.array([epoch]), np.array([sample]))).tolist()
        for seed, epoch, sample in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert len({tuple(indices) for indices in found}) == 4


def test_everything_can_be_masked_and_nothing_is_an_empty_batch() -> None:
    masks, _ = many(4, 3, ratio=1.0)
    assert masks.indices.tolist() == list(range(12))
    empty = np.zeros(0, np.int64)
    assert len(choose_masked(empty, empty, np.zeros(0, np.uint64))) == 0


def test_too_long_for_the_bits_of_a_position_is_refused() -> None:
    with pytest.raises(DataError, match="65536 tokens"):
        choose_masked(np.array([65536]), np.array([1]), KEYS[:1])


def test_spread_draws_a_ratio_for_each_sequence() -> None:
    assert num_masks(LENGTHS, KEYS, 0.3, 0.25).tolist() == [9, 3, 17]
    keys = sample_keys(1, np.zeros(5000, np.int64), np.arange(5000))
    ratios = num_masks(np.full(5000, 400), keys, 0.3, 0.2) / 400
    assert 0.099 < ratios.min() < 0.105 and 0.495 < ratios.max() < 0.503
    assert np.abs(np.quantile(ratios, [0.25, 0.5, 0.75]) - [0.2, 0.3, 0.4]).max() < 0.01
