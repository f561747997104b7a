"""Expansion against a plain loop over positions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exlm_dist.data.expansion import expand, expanded_lengths, wrap
from exlm_dist.data.masking import mask_batch, num_masks, sample_keys
from exlm_dist.tokenizers.tokenizer import BOS, EOS, MASK, NUM_SPECIAL


def by_hand(payloads: list[list[int]], masked: list[list[int]], states: int, anchors: bool) -> dict[str, list]:
    """What expansion means, one position at a time."""
    names = ("input_ids", "position", "clone", "state_index", "target_ids", "is_masked")
    out: dict[str, list] = {name: [] for name in names}
    out["cu_tokens"], out["cu_targets"] = [0], [0]
    for payload, hidden in zip(payloads, masked):
        sequence = [BOS, *payload, EOS]
        for position, token in enumerate(sequence):
            anchor = position in (0, len(sequence) - 1)
            target = anchors if anchor else position - 1 in hidden
            for clone in range(1, states + 1) if target else [0]:
                if target:
                    out["state_index"].append(len(out["input_ids"]))
                out["input_ids"].append(MASK if target and not anchor else token)
                out["position"].append(position)
                out["clone"].append(clone)
            if target:
                out["target_ids"].append(token)
                out["is_masked"].append(not anchor)
        out["cu_tokens"].append(len(out["input_ids"]))
        out["cu_targets"].append(len(out["target_ids"]))
    return out


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 5), st.booleans(), st.integers(0, 999))
def test_equals_a_loop_over_positions(lengths: list[int], states: int, anchors: bool, seed: int) -> None:
    sizes = np.array(lengths)
    tokens = np.random.default_rng(seed).integers(NUM_SPECIAL, 60, sizes.sum())
    keys = sample_keys(seed, np.zeros_like(sizes), np.arange(len(sizes)))
    masks = mask_batch(tokens, sizes, keys, ratio=0.3, vocab_size=60)
    starts, edges = np.cumsum(sizes) - sizes, np.concatenate([[0], np.cumsum(masks.counts)])
    payloads = [tokens[start : start + size].tolist() for start, size in zip(starts, sizes)]
    hidden = [(masks.indices[first:last] - start).tolist() for start, first, last in zip(starts, edges, edges[1:])]
    result = expand(wrap(tokens, sizes, masks, anchors), states)
    for name, expected in by_hand(payloads, hidden, states, anchors).items():
        assert getattr(result, name).tolist() == expected, name
    lengths_known = expanded_lengths(sizes, num_masks(sizes, keys, 0.3), states, anchors)
    assert np.array_equal(np.diff(result.cu_tokens), lengths_known)


@pytest.mark.parametrize("anchors", [True, False])
def test_kept_and_random_tokens_are_expanded_as_seen(anchors: bool) -> None:
    sizes = np.array([30, 12])
    tokens = np.arange(42) + NUM_SPECIAL
    keys = sample_keys(0, np.zeros(2, np.int64), np.arange(2))
    masks = mask_batch(tokens, sizes, keys, ratio=0.5, keep=0.5, random=0.2, vocab_size=60)
    result = expand(wrap(tokens, sizes, masks, anchors), 3)
    seen = result.input_ids[result.state_index].reshape(-1, 3)
    assert (seen == seen[:, :1]).all()
    assert np.array_equal(seen[result.is_masked, 0], masks.visible)
    assert np.array_equal(result.target_ids[result.is_masked], tokens[masks.indices])


def test_one_state_is_the_plain_masked_language_model() -> None:
    sizes = np.array([10])
    tokens = np.arange(10) + NUM_SPECIAL
    keys = sample_keys(0, np.zeros(1, np.int64), np.zeros(1, np.int64))
    masks = mask_batch(tokens, sizes, keys, ratio=0.3, vocab_size=60)
    result = expand(wrap(tokens, sizes, masks, anchors=False), 1)
    assert len(result.input_ids) == 12 and result.position.tolist() == list(range(12))
    assert np.flatnonzero(result.clone).tolist() == (masks.indices + 1).tolist() and result.clone.max() == 1
