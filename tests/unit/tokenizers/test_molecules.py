"""Molecules: the policy, the reasons, and the demo corpus."""

from itertools import islice

import pytest

from exlm_dist.prepare.demo.demo_molecules import demo_molecules
from exlm_dist.prepare.demo.drugs import DRUGS
from exlm_dist.tokenizers.molecules import MoleculeError, canonical_smiles, make_policy
from exlm_dist.tokenizers.smiles_tokenizer import split_smiles
from exlm_dist.utils.errors import DataError


def test_policy() -> None:
    keep, flat = make_policy(), make_policy(stereo="drop")
    assert canonical_smiles("OCC", keep) == canonical_smiles("CCO", keep) == "CCO"
    left, right = "C[C@H](N)C(=O)O", "C[C@@H](N)C(=O)O"
    assert canonical_smiles(left, keep) != canonical_smiles(right, keep)
    assert canonical_smiles(left, flat) == canonical_smiles(right, flat) == "CC(N)C(=O)O"
    assert canonical_smiles("F/C=C/[13CH3]", flat) == "[13CH3]C=CF"
    base = make_policy(salts="largest_fragment")
    assert canonical_smiles("[Na+].CC(=O)[O-]", base) == canonical_smiles("CC(=O)[O-].[Na+]", base) == "CC(=O)[O-]"
    assert "." in canonical_smiles("[Na+].CC(=O)[O-]", keep)
    with pytest.raises(DataError, match="stereo = 'some': must be one of keep, drop"):
        make_policy(stereo="some")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hello", "not SMILES"),
        ("C1CC", "not SMILES"),
        ("", "no atoms"),
        ("C(C)(C)(C)(C)C", "chemistry: Explicit valence"),
        ("c1cccc1", "chemistry: "),
    ],
)
def test_reasons(text: str, reason: str) -> None:
    with pytest.raises(MoleculeError, match=reason):
        canonical_smiles(text, make_policy())


def test_every_drug_parses_and_is_distinct() -> None:
    found = {canonical_smiles(smiles, make_policy()) for smiles in DRUGS.values()}
    assert len(found) == len(DRUGS) >= 150


def test_demo_corpus_is_large_distinct_canonical_and_reproducible() -> None:
    molecules = list(demo_molecules(20_000, seed=0, workers=2))
    assert len(set(molecules)) == 20_000
    assert molecules[:500] == list(demo_molecules(500, seed=0)) != list(demo_molecules(500, seed=1))
    for smiles in islice(molecules, 0, None, 200):
        assert canonical_smiles(smiles, make_policy()) == smiles and split_smiles(smiles)


def test_too_many_demo_molecules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exlm_dist.prepare.demo.demo_molecules.DRUGS", {"aspirin": DRUGS["aspirin"]})
    with pytest.raises(DataError, match="the demo fragments yield only .* 90 were asked for"):
        list(demo_molecules(90))
