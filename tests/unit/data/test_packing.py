"""The plan of micro-batches and the packed arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packed import check_batch

from exlm_dist.data.expansion import expand, wrap
from exlm_dist.data.masking import mask_batch, sample_keys
from exlm_dist.data.packing import pack, plan_micro_batches, rounded_up
from exlm_dist.tokenizers.tokenizer import NUM_SPECIAL


def spread(lengths: np.ndarray, plan: list[np.ndarray]) -> float:
    """(largest - smallest) / mean of the micro-batches' sums of `lengths`: how long the fastest one waits."""
    sums = np.array([lengths[members].sum() for members in plan])
    return float((sums.max() - sums.min()) / sums.mean())


@given(st.lists(st.integers(1, 500), min_size=1, max_size=80), st.integers(1, 12))
def test_plan_deals_every_sequence_once_in_near_equal_sizes(lengths: list[int], count: int) -> None:
    plan = plan_micro_batches(np.array(lengths), count)
    assert len(plan) == count and sorted(np.concatenate(plan).tolist()) == list(range(len(lengths)))
    sizes = [len(members) for members in plan]
    assert max(sizes) - min(sizes) <= (len(lengths) % count != 0)
    for members in plan:
        assert (np.diff(np.array(lengths)[members]) <= 0).all(), "longest first"


def test_plan_is_frozen() -> None:
    plan = plan_micro_batches(np.array([5, 9, 7, 7, 1, 3, 8, 2]), 2)
    assert [members.tolist() for members in plan] == [[1, 3, 5, 7], [6, 2, 0, 4]]


@pytest.mark.parametrize("micro", [8, 32])
def test_balanced_is_far_evener_than_in_order(micro: int) -> None:
    lengths = np.random.default_rng(0).normal(60, 15, 256).astype(np.int64).clip(5)
    naive = np.arange(256).reshape(-1, micro)
    assert spread(lengths, plan_micro_batches(lengths, 256 // micro)) < spread(lengths, list(naive)) / 4


def test_equal_lengths_are_dealt_without_spread() -> None:
    assert spread(np.full(64, 126), plan_micro_batches(np.full(64, 126), 8)) == 0.0


@given(st.integers(0, 3000), st.integers(1, 300))
def test_rounding_up(size: int, bucket: int) -> None:
    rounded = rounded_up(size, bucket)
    assert rounded % bucket == 0 and rounded >= max(size, 1) and (rounded - bucket < size or rounded == bucket)


@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=9),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([1, 7, 64]),
    st.integers(0, 99),
)
def test_a_part_packs_as_it_would_alone(lengths: list[int], states: int, anchors: bool, bucket: int, seed: int) -> None:
    sizes = np.array(lengths)
    ids = np.arange(len(sizes))
    tokens = np.random.default_rng(seed).integers(NUM_SPECIAL, 50, sizes.sum())
    keys = sample_keys(seed, 0 * ids, ids)

    def packed(rows: np.ndarray, payload: np.ndarray, first: int, last: int):
        masks = mask_batch(payload, sizes[rows], keys[rows], ratio=0.2, vocab_size=50)
        expanded = expand(wrap(payload, sizes[rows], masks, anchors), states)
        members = rows[first:last]
        return pack(
            expanded, first, last, states=states, bucket=bucket, sample_ids=members, epochs=0 * members, step=4, index=2
        )

    cut = len(sizes) // 2
    start = sizes[:cut].sum()
    part = packed(ids, tokens, cut, len(sizes))
    alone = packed(ids[cut:], tokens[start:], 0, len(sizes) - cut)
    for batch in (part, alone):
        check_batch(batch)
        assert batch.num_original_tokens == sizes[cut:].sum() + 2 * (len(sizes) - cut)
        assert all(len(array) % bucket == 0 for array in (batch.input_ids, batch.state_index, batch.target_ids))
        assert len(batch.input_ids) - batch.num_tokens < bucket
    for name, value in vars(part).items():
        assert np.array_equal(value, getattr(alone, name)), name


def test_broken_batches_are_found() -> None:
    sizes = np.array([6, 9])
    ids = np.arange(2)
    masks = mask_batch(np.full(15, 7), sizes, sample_keys(0, 0 * ids, ids), ratio=0.3, vocab_size=50)
    expanded = expand(wrap(np.full(15, 7), sizes, masks, True), 2)

    damage = {"input_ids": -1, "clone": 0, "position": 3, "state_index": 1, "cu_states": 1, "is_masked": -1}
    for name, index in damage.items():
        batch = pack(expanded, 0, 2, states=2, bucket=32, sample_ids=ids, epochs=0 * ids, step=0, index=0)
        array = getattr(batch, name)
        array[index] = 1 - array[index] if array.dtype == np.int64 else True
        with pytest.raises(AssertionError):
            check_batch(batch)
