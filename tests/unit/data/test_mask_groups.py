"""What is masked at once: words, atoms, rings and spans: pure functions with frozen values, all whole but for one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_run import MOLECULES

from exlm_dist.config.schema import MaskingConfig
from exlm_dist.data.mask_groups import Grouping, smiles_kinds, word_starts
from exlm_dist.data.masking import mask_batch, num_masks, sample_keys
from exlm_dist.tokenizers.smiles_tokenizer import SmilesTokenizer, split_smiles, vocabulary_from
from exlm_dist.tokenizers.tokenizer import NUM_SPECIAL, SPECIAL_NAMES
from exlm_dist.utils.errors import ConfigError

SMILES = [
    *MOLECULES,
    "C[C@@H]1CC2CCC1C2",
    "[Na+].CC(=O)[O-]",
    "C1CC/C=C/CCC=1",
    "c1ccc2ccccc2c1",
    "C%10CC%10C.C1.C1",
    "N#N",
]
TOKENIZER = SmilesTokenizer(vocabulary_from({token: 1 for text in SMILES for token in split_smiles(text)}), {})
WORDS = [*SPECIAL_NAMES, "▁the", "▁a", "ing", "s", "▁walk", ".", "▁mat", "ter"]


def smiles_grouping(unit: str, span_p: float = 0.0) -> Grouping:
    grouping = Grouping.of(MaskingConfig(unit=unit, span_p=span_p), TOKENIZER)
    assert grouping is not None
    return grouping


def keys_of(count: int, seed: int = 3) -> np.ndarray:
    return sample_keys(seed, np.zeros(count, np.int64), np.arange(count))


def units_of(smiles: str, unit: str) -> list[str]:
    """The text of each unit, in the order of their first tokens."""
    tokens, lengths = TOKENIZER.encode_batch([smiles])
    groups = smiles_grouping(unit).groups(tokens, lengths, keys_of(1))
    parts: dict[int, str] = {}
    for token, group in zip(split_smiles(smiles), groups.tolist()):
        parts[group] = parts.get(group, "") + token
    return list(parts.values())


def test_atoms_have_their_bond_and_ring_closures() -> None:
    assert units_of("C1CC/C=C/CCC=1", "atom") == ["C1", "C", "C", "/C", "=C", "/C", "C", "C=1"]
    assert units_of("CC(=O)[O-].[Na+]", "atom") == ["C", "C", "(", "=O", ")", "[O-]", ".", "[Na+]"]
    assert units_of("C[C@@H]1CC2CCC1C2", "atom") == ["C", "[C@@H]1", "C", "C2", "C", "C", "C1", "C2"]


@pytest.mark.parametrize(
    ("smiles", "expected"),
    [
        ("Cc1ccccc1O", ["C", "c1ccccc1", "O"]),
        ("OC1CC(N)C1", ["O", "C1CCC1", "(", "N", ")"]),
        ("C1CC/C=C/CCC=1", ["C1CC/C=C/CCC=1"]),
        ("c1ccc2ccccc2c1", ["c1ccc1", "c2ccccc2"]),  # the ring that closes first has the shared atoms
        ("C12CCC1CC2", ["C12CCC1", "CC2"]),
        ("C1.C1", ["C1", ".", "C1"]),  # closed, but without a path within one molecule
        ("C(C1)CC1", ["CC1CC1", "(", ")"]),
        ("C%10CC%10C", ["C%10CC%10", "C"]),
    ],
)
def test_rings_are_the_path_between_closures(smiles: str, expected: list[str]) -> None:
    assert units_of(smiles, "ring") == expected


@pytest.mark.parametrize("smiles", [text for text in SMILES if "." not in text])
def test_ring_atoms_are_those_of_rdkit(smiles: str) -> None:
    chem = pytest.importorskip("rdkit.Chem")
    molecule = chem.MolFromSmiles(smiles)
    tokens, lengths = TOKENIZER.encode_batch([smiles])
    kinds = smiles_kinds(TOKENIZER.tokens())[tokens]
    atoms = smiles_grouping("atom").groups(tokens, lengths, keys_of(1))[kinds == 1]
    rings = smiles_grouping("ring").groups(tokens, lengths, keys_of(1))[kinds == 1]
    sizes = np.bincount(rings)
    in_ring = np.array([atom.IsInRing() for atom in molecule.GetAtoms()])
    assert len(set(atoms.tolist())) == molecule.GetNumAtoms()
    assert (in_ring >= (sizes[rings] > 1)).all(), "what is masked as a ring is in one"
    fused = molecule.GetRingInfo().NumRings() > 1 and any(
        molecule.GetRingInfo().NumAtomRings(index) > 1 for index in range(molecule.GetNumAtoms())
    )
    assert fused or (in_ring == (sizes[rings] > 1)).all()


def test_words_are_what_spaces_separate() -> None:
    tokens = np.array([7, 5, 9, 7, 8, 10, 6, 11, 12])  # ing | the | walk ing s . | a | mat ter
    grouping = Grouping("word", 0.0, 10, word_starts(WORDS))
    assert grouping.groups(tokens, np.array([9]), keys_of(1)).tolist() == [0, 1, 2, 2, 2, 2, 3, 4, 4]
    assert grouping.groups(tokens, np.array([4, 5]), keys_of(2)).tolist() == [0, 1, 2, 2, 0, 0, 1, 2, 2]


def test_lengths_of_spans_are_those_of_spanbert() -> None:
    lengths = np.full(400, 300)
    spans = Grouping("token", 0.2, 10).groups(np.zeros(lengths.sum(), np.int64), lengths, keys_of(400))
    inner = [np.bincount(row)[:-1] for row in spans.reshape(400, 300)]  # without the last, which the end cuts
    sizes = np.concatenate(inner)
    expected = 0.2 * 0.8 ** np.arange(10) / (1 - 0.8**10)
    found = np.bincount(sizes, minlength=11)[1:] / len(sizes)
    assert sizes.max() == 10 and abs(sizes.mean() - 3.8) < 0.05 and np.abs(found - expected).max() < 0.01


GROUPINGS = {
    "word": Grouping("word", 0.0, 10, word_starts(WORDS)),
    "span": Grouping("token", 0.2, 10),
    "spans of words": Grouping("word", 0.3, 4, word_starts(WORDS)),
    "atom": smiles_grouping("atom"),
    "spans of atoms": smiles_grouping("atom", 0.2),
    "ring": smiles_grouping("ring"),
}


TEXT_TOKENS = NUM_SPECIAL + np.arange(60) * 5 % 8
TEXT_LENGTHS = np.array([20, 7, 33])
#: First 10 of the masked indices at 30 %, of three texts or two molecules.
GOLDEN = {
    "word": [8, 9, 10, 11, 14, 15, 20, 21, 27, 30],
    "span": [10, 11, 12, 13, 14, 15, 20, 21, 27, 28],
    "spans of words": [13, 14, 16, 17, 18, 19, 20, 21, 27, 30],
    "atom": [9, 11, 12, 13, 14, 19, 27, 28, 29, 30],
    "spans of atoms": [15, 16, 17, 18, 19, 20, 21, 22, 23, 24],
    "ring": [5, 6, 7, 8, 9, 19, 21, 22, 23, 24],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_masks_of_groups(name: str) -> None:
    of_text = name in ("word", "span", "spans of words")
    molecules = TOKENIZER.encode_batch(["Cc1ccc2ccccc2c1C(=O)O", "C1CC/C=C/CCC=1"])
    tokens, lengths = (TEXT_TOKENS, TEXT_LENGTHS) if of_text else molecules
    keys = sample_keys(42, np.array([0, 0, 1]), np.array([0, 1, 0]))[: len(lengths)]
    masks = mask_batch(tokens, lengths, keys, ratio=0.3, vocab_size=100, grouping=GROUPINGS[name])
    assert masks.indices[:10].tolist() == GOLDEN[name]


def test_tokens_of_large_and_small_groups_are_masked_nearly_alike() -> None:
    count, words = 4000, [[5], [6, 7, 8], [5, 7], [6], [9, 10, 7, 8], [11, 12], [5], [6], [5], [9, 7], [11], [6, 8]] * 2
    row = np.concatenate(words)
    sizes = np.full(count, len(row))
    masks = mask_batch(
        np.tile(row, count), sizes, keys_of(count), ratio=0.3, vocab_size=len(WORDS), grouping=GROUPINGS["word"]
    )
    hidden = np.zeros((count, len(row)))
    hidden.reshape(-1)[masks.indices] = 1
    of_size = np.repeat([len(word) for word in words], [len(word) for word in words])
    fraction = [hidden.mean(0)[of_size == size].mean() for size in (1, 2, 3, 4)]
    assert np.abs(np.array(fraction) - 0.3).max() < 0.02, fraction


@pytest.mark.parametrize("name", GROUPINGS)
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_all_masked_groups_but_one_are_whole_and_counts_are_those_announced(name: str, data: st.DataObject) -> None:
    grouping = GROUPINGS[name]
    sizes = np.array(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6)))
    vocab_size = len(WORDS) if "word" in name else TOKENIZER.vocab_size
    generator = np.random.default_rng(data.draw(st.integers(0, 999)))
    tokens = generator.integers(NUM_SPECIAL, vocab_size, sizes.sum())
    keys = keys_of(len(sizes), data.draw(st.integers(0, 2**62)))
    ratio = data.draw(st.floats(0.05, 0.95))
    settings_ = {"ratio": ratio, "vocab_size": vocab_size, "grouping": grouping, "spread": 0.04}
    masks = mask_batch(tokens, sizes, keys, **settings_)
    assert np.array_equal(masks.counts, num_masks(sizes, keys, ratio, 0.04))
    groups, at, first = grouping.groups(tokens, sizes, keys), 0, 0
    for row, (size, count) in enumerate(zip(sizes.tolist(), masks.counts.tolist())):
        own = groups[at : at + size]
        assert 0 <= own.min() and own.max() < size
        hidden = np.zeros(size, bool)
        hidden[masks.indices[first : first + count] - at] = True
        partial = [group for group in set(own[hidden].tolist()) if not hidden[own == group].all()]
        assert hidden.sum() == count and len(partial) <= 1
        for group in partial:  # its first tokens
            assert np.flatnonzero(hidden[own == group]).tolist() == list(range(hidden[own == group].sum()))
        alone = mask_batch(tokens[at : at + size], sizes[row : row + 1], keys[row : row + 1], **settings_)
        assert np.array_equal(alone.indices + at, masks.indices[first : first + count])
        at, first = at + size, first + count


def test_units_of_another_domain_are_refused_and_none_are_guessed() -> None:
    with pytest.raises(ConfigError, match="masking.unit word is for data of the domain text.*token or atom or ring"):
        Grouping.of(MaskingConfig(unit="word"), TOKENIZER)
    assert Grouping.of(MaskingConfig(), TOKENIZER) is None
    unknown = Grouping.of(MaskingConfig(unit="ring"), None)
    assert unknown is not None
    with pytest.raises(ValueError, match="need the tokenizer"):
        unknown.groups(np.array([5]), np.array([1]), keys_of(1))
