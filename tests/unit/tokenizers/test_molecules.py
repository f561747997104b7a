"""Molecules: the policy, the reasons, and the demo corpus."""

from contextlib import suppress
from itertools import islice

import pytest
from rdkit import Chem

from exlm_dist.prepare.demo.demo_molecules import demo_molecules
from exlm_dist.prepare.demo.drugs import DRUGS
from exlm_dist.tokenizers import molecules
from exlm_dist.tokenizers.molecules import MoleculeError, canonical_smiles, make_policy, murcko_scaffold, smiles_in
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


@pytest.mark.parametrize("molecule", ["CCO", "C[C@H](F)Cl", "[Na+].[Cl-]"])
def test_no_character_is_dropped(molecule: str) -> None:
    """RDKit's own parser reads `CCO CCN`, and 'CCO' with nearly any character beyond ASCII around it, as CCO."""
    policy = make_policy()
    outside = [chr(code) for code in [*range(33), *range(127, 0x180), 0x2028, 0x4E00, 0xFEFF, 0xDC80, 0x1F600]]
    for character in outside:
        for at in range(len(molecule) + 1):
            with pytest.raises(MoleculeError, match="not SMILES"):
                canonical_smiles(molecule[:at] + character + molecule[at:], policy)
    for code in range(33, 127):
        for at in (0, len(molecule)):
            longer = molecule[:at] + chr(code) + molecule[at:]
            with suppress(MoleculeError):
                assert canonical_smiles(longer, policy) != canonical_smiles(molecule, policy), longer


def test_canonical_forms_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = make_policy(stereo="drop")
    once = r"[H]/[NH+]=C(\N)/c1ccc(cc1)OCCCCCOc2ccc(cc2)/C(=[NH+]/[H])/N"
    assert Chem.MolToSmiles(_without_stereo(once)) != Chem.MolToSmiles(
        _without_stereo(Chem.MolToSmiles(_without_stereo(once)))
    ), "RDKit has become stable here: find another example"
    assert canonical_smiles(canonical_smiles(once, flat), flat) == canonical_smiles(once, flat)
    after = {"start": "b", "b": "c", "c": "a", "a": "b"}  # a circle: one of its members, from wherever it is entered
    monkeypatch.setattr(molecules, "_one_pass", lambda text, policy: after[text])
    assert {canonical_smiles(text, flat) for text in after} == {"a"}
    monkeypatch.setattr(molecules, "_one_pass", lambda text, policy: text + "C")
    with pytest.raises(MoleculeError, match="no stable canonical form"):
        canonical_smiles("C", flat)


def _without_stereo(text: str) -> Chem.Mol:
    molecule = Chem.MolFromSmiles(text)
    Chem.RemoveStereochemistry(molecule)
    return molecule


@pytest.mark.parametrize("text", ["C" * 30_000, "C(" * 9000 + "C" + ")" * 9000, "C" * 200_000, ".".join("C" * 9000)])
def test_huge_molecules_are_refused_before_they_end_the_process(text: str) -> None:
    with pytest.raises(MoleculeError, match="^too large: .* at most"):
        canonical_smiles(text, make_policy())
    with pytest.raises(MoleculeError, match="^too large: .* at most"):
        murcko_scaffold(text)
    assert canonical_smiles("C" * 4999, make_policy()) == "C" * 4999


def test_what_stands_beside_the_smiles() -> None:
    assert smiles_in(" CCO\t") == "CCO" and smiles_in("C[C@H](F)Cl |&1:1|") == "C[C@H](F)Cl"
    for text, reason in (("CCO ethanol", "not SMILES"), ("", "empty"), (" \u00a0", "empty")):
        with pytest.raises(MoleculeError, match=reason):
            smiles_in(text)


def test_every_drug_parses_and_is_distinct() -> None:
    found = {canonical_smiles(smiles, make_policy()) for smiles in DRUGS.values()}
    assert len(found) == len(DRUGS) >= 150


def test_demo_corpus_is_large_distinct_canonical_and_reproducible() -> None:
    made = list(demo_molecules(20_000, seed=0, workers=2))
    assert len(set(made)) == 20_000
    assert made[:500] == list(demo_molecules(500, seed=0)) != list(demo_molecules(500, seed=1))
    for smiles in islice(made, 0, None, 200):
        assert canonical_smiles(smiles, make_policy()) == smiles and split_smiles(smiles)


def test_too_many_demo_molecules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exlm_dist.prepare.demo.demo_molecules.DRUGS", {"aspirin": DRUGS["aspirin"]})
    with pytest.raises(DataError, match="the demo fragments yield only .* 90 were asked for"):
        list(demo_molecules(90))
