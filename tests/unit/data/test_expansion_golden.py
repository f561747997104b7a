"""Expansion beside the authors' code, row by row, on any set of golden values of the recorded form.

A row of theirs can be followed by padding or, in some batches, by phantom states (copies of its last token up to the
longest row). Neither is part of the row: its own states must be equal to ours.
"""

from __future__ import annotations

import numpy as np
import pytest
from golden import Case, Golden, golden_cases

from exlm_dist.data.expansion import Expanded, MarkedSequences, expand, wrap
from exlm_dist.data.masking import Masks
from exlm_dist.tokenizers.tokenizer import BOS, EOS, PAD

FILE = "expansion.npz"
ROWS = [
    (name, row)
    for name in golden_cases(FILE)
    for row in range(len(Golden(FILE).case(name).settings["expanded_length"]))
]


def unexpanded(case: Case, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the model sees, the original tokens and the masked flags of one row, without its padding."""
    seen = case["in/src_tokens"][row].astype(np.int64)
    length = int((seen != PAD).sum())
    targets = case["in/target"][row].astype(np.int64)
    originals = np.where(targets == PAD, seen, targets)
    masked = case["in/ext_mask"][row] if "in/ext_mask" in case else np.zeros(len(seen), bool)
    return seen[:length], originals[:length], masked[:length].copy()


def assert_equals_row(ours: Expanded, case: Case, row: int) -> None:
    """`ours`, one sequence, against the authors' arrays over the row's own states."""
    own = len(ours.input_ids)
    assert own == case.settings["expanded_length"][row]
    for name, value in {
        "ext_src_tokens": ours.input_ids,
        "ext_index": ours.position,
        "pos_dim1": ours.position,
        "pos_dim2": ours.clone,
    }.items():
        assert np.array_equal(case[f"out/{name}"][row][:own], value), name
    states = np.flatnonzero(case["out/is_ext_state"][row])
    assert np.array_equal(states, ours.state_index)
    assert np.array_equal(case["out/ext_gather_pos"][row][states], np.arange(len(states)))
    beyond = case["out/ext_src_tokens"][row][own:]
    if case.settings["phantom_rows"][row]:
        assert len(beyond) and (beyond == ours.input_ids[-1]).all(), "copies of the last token"
    else:
        assert (beyond == PAD).all()


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_expansion_equals_the_authors(name: str, row: int) -> None:
    case = Golden(FILE).case(name)
    seen, originals, _ = unexpanded(case, row)
    indices = np.flatnonzero(case["out/ext_mask_after"][row][: len(seen)])
    marked = MarkedSequences(seen, np.array([len(seen)]), indices, originals[indices], np.ones(len(indices), bool))
    assert_equals_row(expand(marked, case.settings["k"]), case, row)


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_wrapping_a_payload_equals_the_authors(name: str, row: int) -> None:
    """The same from our own payload and masks, with anchors: targets and is_masked too."""
    case = Golden(FILE).case(name)
    seen, originals, masked = unexpanded(case, row)
    if seen[0] != BOS or seen[-1] != EOS:
        pytest.skip("a row cut anywhere, or whose BOS or EOS is masked: ours start with BOS and end with EOS, seen")
    if np.isin(originals[1:-1], (BOS, EOS)).any():
        pytest.skip("an EOS inside the row: theirs expands it, ours has none")
    if masked[[0, -1]].any():
        pytest.skip("BOS or EOS masked: ours never are")
    indices = np.flatnonzero(masked[1:-1])
    masks = Masks(indices, np.array([len(indices)]), seen[1:-1][indices])
    ours = expand(wrap(originals[1:-1], np.array([len(seen) - 2]), masks, anchors=True), case.settings["k"])
    assert_equals_row(ours, case, row)
    assert ours.target_ids.tolist() == [BOS, *originals[1:-1][indices], EOS]
    assert ours.is_masked.tolist() == [False, *[True] * len(indices), False]
