"""Random SMILES: pure functions of (seed, molecule, form) that stay the molecule, and folders that have them."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_folder import files_of, texts_of, verify_folder

from exlm_dist.cli import main
from exlm_dist.data.manifest import read_manifest
from exlm_dist.data.random_smiles import ATTEMPTS, RandomSmiles, atom_order, drawn_form, random_forms
from exlm_dist.prepare import random_spool
from exlm_dist.prepare.demo.drugs import DRUGS
from exlm_dist.prepare.random_spool import draw_forms
from exlm_dist.prepare.smiles import prepare_smiles
from exlm_dist.tokenizers.molecules import RDKIT_VERSION, AtomOrders, canonical_smiles, make_policy
from exlm_dist.tokenizers.smiles_tokenizer import split_smiles
from exlm_dist.utils.errors import ConfigError, DataError

POLICY = make_policy()
C60 = (
    "c12c3c4c5c1c1c6c7c2c2c8c3c3c9c4c4c%10c5c5c1c1c6c6c%11c7c2c2c7c8c3c3c8c9c4c4c9c%10c5c5c1c1c6c6c%11c2c2c7c3c3c8c4c4c9c5"
    "c1c1c6c2c3c41"
)
#: Canonical SMILES by RDKit 2026.09.1 -> their forms 1 to 3 with seed 7.
GOLDEN = {
    "C[C@H](N)C(=O)O": ["[C@H](N)(C)C(O)=O", "C[C@H](N)C(=O)O", "OC([C@@H](N)C)=O"],
    "F/C=C/C=C\\Cl": ["F/C=C/C=C\\Cl", "C(=C\\F)/C=C\\Cl", "C(=C/Cl)/C=C/F"],
    "CC(=O)Oc1ccccc1C(=O)[O-].[Na+]": [
        "c1c(C(=O)[O-])c(OC(C)=O)ccc1.[Na+]",
        "c1(OC(=O)C)c(C(=O)[O-])cccc1.[Na+]",
        "O=C(Oc1ccccc1C(=O)[O-])C.[Na+]",
    ],
    "C[N+](C)(C)CC(=O)[O-].Cl.O": [
        "C[N+](C)(C)CC(=O)[O-].O.Cl",
        "C[N+](C)(CC([O-])=O)C.Cl.O",
        "C[N+](C)(CC([O-])=O)C.O.Cl",
    ],
    "c1c[nH]c(CN2CCC3(CCC3)C2)c1": [
        "C1CC2(CCN(Cc3[nH]ccc3)C2)C1",
        "c1cc[nH]c1CN1CC2(CCC2)CC1",
        "[nH]1cccc1CN1CCC2(CCC2)C1",
    ],
    "OC[C@H]1O[C@@H](O)[C@H](O)[C@@H](O)[C@@H]1O": [
        "O[C@H]1[C@H](O)O[C@H](CO)[C@@H](O)[C@@H]1O",
        "C([C@H]1O[C@@H](O)[C@H](O)[C@@H](O)[C@@H]1O)O",
        "[C@@H]1(O)[C@@H](CO)O[C@@H](O)[C@H](O)[C@H]1O",
    ],
    "[2H]C([2H])([2H])O[N+](=O)[O-]": [
        "O=[N+](OC([2H])([2H])[2H])[O-]",
        "[2H]C([2H])(O[N+]([O-])=O)[2H]",
        "C([2H])(O[N+](=O)[O-])([2H])[2H]",
    ],
    "C12C3C4C1C1C2C3C41": ["C12C3C4C1C1C2C3C41", "C12C3C4C5C3C1C5C24", "C12C3C4C5C3C1C5C24"],
}
#: What is hard for a writer: stereo of rings, bonds and cages, many rings, salts, charges, isotopes, one atom.
HARD = [*GOLDEN, C60, "[Xe]", "C1CC1", "[13CH3][O][Pt]", "C[C@H]1CC[C@@H](C)CC1", "F/C=C/F", "CC=[C@]=CC"] + [
    "C[C@@H]1C[C@H]2C[C@@H]1CC2",
    "O=C1[C@H]2[C@@H]3C=C[C@@H](C3)[C@H]2C(=O)O1",
    "C/C=C/C=C\\C=C/C",
    "N[C@@H](CS)C(=O)[O-].[NH4+].[Ca+2].[Cl-].[Cl-]",
]
MOLECULES = st.sampled_from([canonical_smiles(smiles, POLICY) for smiles in [*HARD, *DRUGS.values()]])
NUMBERS = st.integers(0, 2**63 - 1)


def form_of(smiles: str, seed: int, form: int) -> str:
    return drawn_form(smiles, seed=seed, form=form, attempt=0)


def test_golden_orders_of_atoms() -> None:
    aspirin = "CC(=O)Oc1ccccc1C(=O)O"
    assert atom_order("CCO", 3, seed=0, form=1).tolist() == [1, 2, 0]
    assert atom_order(aspirin, 13, seed=7, form=2).tolist() == [7, 1, 3, 10, 12, 6, 0, 4, 5, 9, 11, 2, 8]
    last = atom_order(aspirin, 13, seed=2**63 - 1, form=1, attempt=3)
    assert last.tolist() == [1, 8, 5, 3, 9, 6, 7, 4, 10, 11, 0, 12, 2]


@pytest.mark.skipif(RDKIT_VERSION != "2026.09.1", reason="the texts are those of RDKit 2026.09.1")
def test_golden_texts() -> None:
    assert {smiles: [form_of(smiles, 7, form) for form in (1, 2, 3)] for smiles in GOLDEN} == GOLDEN
    assert "%24" in form_of(C60, 7, 1)


@settings(max_examples=80, deadline=None)
@given(MOLECULES, NUMBERS, st.integers(1, 10**6))
def test_a_form_is_the_molecule_and_nothing_else_decides_it(smiles: str, seed: int, form: int) -> None:
    text = form_of(smiles, seed, form)
    assert canonical_smiles(text, POLICY) == smiles
    assert split_smiles(text) is not None
    form_of(smiles, seed ^ 1, form)
    assert form_of(smiles, seed, form) == text


def test_forms_are_those_of_other_threads_and_of_another_count() -> None:
    rows = [canonical_smiles(smiles, POLICY) for smiles in [*HARD, *list(DRUGS.values())[:40]]]
    here = draw_forms(POLICY, 1000, RandomSmiles(3, 5), rows)
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(draw_forms, POLICY, 1000, RandomSmiles(2, 5), rows[::-1]) for _ in range(3)]
    for other in others:
        assert [texts[::-1] for texts in other.result().forms] == here.forms[:2]
    assert here.forms[0] != here.forms[1] and not here.again and here.canonical == 0
    assert draw_forms(POLICY, 1000, RandomSmiles(3, 6), rows).forms != here.forms
    assert here.distinct == sum(len({smiles, *texts}) for smiles, *texts in zip(rows, *here.forms))


@pytest.mark.parametrize(
    "policy", [make_policy("drop"), make_policy(salts="largest_fragment")], ids=["stereo", "salts"]
)
def test_forms_follow_the_policy(policy: dict) -> None:
    rows = [canonical_smiles(smiles, policy) for smiles in HARD]
    drawn = draw_forms(policy, 1000, RandomSmiles(2), rows)
    assert all([canonical_smiles(text, policy) for text in texts] == rows for texts in drawn.forms)


def test_what_cannot_be_used_is_drawn_again_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    smiles = "CC(C)(C)c1ccc2occ(CC(=O)Nc3ccccc3F)c2c1"
    least = len(split_smiles(smiles))
    assert next(random_forms(smiles, POLICY, least, RandomSmiles(1))) == (smiles, ("too long",) * ATTEMPTS)
    for most, instead in ((least, True), (least + 2, False)):
        drawn = draw_forms(POLICY, most, RandomSmiles(40), [smiles])
        assert drawn.again.keys() == {"too long"} and all(len(split_smiles(text)) <= most for (text,) in drawn.forms)
        assert (drawn.canonical > 0) == instead and sum(text == smiles for (text,) in drawn.forms) >= drawn.canonical
    write, count = AtomOrders.smiles, iter(range(1000))
    monkeypatch.setattr(AtomOrders, "smiles", lambda self, order: "CCO" if next(count) % 2 else write(self, order))
    drawn = draw_forms(POLICY, 100, RandomSmiles(4), [smiles])
    assert drawn.again == {"another molecule": 3} and drawn.canonical == 0
    monkeypatch.setattr(AtomOrders, "smiles", lambda self, order: "C1CC")
    assert draw_forms(POLICY, 100, RandomSmiles(1), [smiles])[1:] == (1, {"another molecule": ATTEMPTS}, 1)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "drugs.csv"
    path.write_text("\n".join(["smiles", *DRUGS.values(), "OCC", "CCO", "not one"]) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(table: Path) -> Path:
    prepare_smiles([str(table)], table.parent / "random", valid_fraction=0.1, random_smiles=2, workers=1)
    return table.parent / "random"


def test_the_folder(table: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = table.parent / "plain"
    prepare_smiles([str(table)], plain, valid_fraction=0.1, workers=1)
    train, valid = texts_of(plain, "train"), texts_of(plain, "valid")
    random = texts_of(folder, "train")
    assert texts_of(folder, "valid") == valid and len(random) == 3 * len(train)
    assert random[: len(train)] == train, "the first form is the canonical one"
    for form in (1, 2):
        texts = random[form * len(train) : (form + 1) * len(train)]
        assert [canonical_smiles(text, POLICY) for text in texts] == train
        assert texts == [form_of(smiles, 0, form) for smiles in train]
    assert not {canonical_smiles(text, POLICY) for text in random} & set(valid)
    assert verify_folder(folder) == [] and main(["data", "verify", str(folder)]) == 0
    manifest = read_manifest(folder)
    assert manifest["splits"]["train"]["forms"] == 3 and manifest["splits"]["train"]["unknown_tokens"] == 0
    assert (manifest["request"]["random_smiles"], manifest["request"]["random_seed"]) == (2, 0)
    assert manifest["policy"]["rdkit"] == RDKIT_VERSION
    distinct = sum(len({random[i], random[i + len(train)], random[i + 2 * len(train)]}) for i in range(len(train)))
    assert manifest["statistics"]["random_smiles"] == {
        "count": 2, "seed": 0, "molecules": len(train), "distinct": distinct, "drawn_again": {}, "canonical_instead": 0
    }  # fmt: skip
    assert manifest["statistics"]["kept"] == len(train) + len(valid)
    assert "forms" not in read_manifest(plain)["splits"]["train"]
    capsys.readouterr()
    assert main(["data", "stats", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert f"{3 * len(train):,} sequences (3 of each of {len(train):,} molecules)" in shown
    assert "2 SMILES of each training molecule beside the canonical one, seed 0: " in shown


def test_the_folder_does_not_depend_on_workers_or_on_the_order_of_the_input(
    table: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_spool, "DRAWN_PER_TASK", 50)
    prepare_smiles([str(table)], table.parent / "two", valid_fraction=0.1, random_smiles=2, workers=2)
    assert files_of(table.parent / "two") == files_of(folder)
    shutil.rmtree(table.parent / "two")
    backwards = table.parent / "reversed.csv"
    head, *rows = table.read_text().splitlines()
    backwards.write_text("\n".join([head, *rows[::-1]]) + "\n")
    prepare_smiles([str(backwards)], table.parent / "reversed", valid_fraction=0.1, random_smiles=2, workers=1)
    assert sorted(texts_of(table.parent / "reversed", "train")) == sorted(texts_of(folder, "train"))


def test_what_is_asked_for_is_part_of_the_request(table: Path, folder: Path) -> None:
    assert prepare_smiles([str(table)], folder, valid_fraction=0.1, max_length=512, random_smiles=2).reused
    with pytest.raises(DataError, match="random_seed: 0 then, 1 now"):
        prepare_smiles([str(table)], folder, valid_fraction=0.1, random_smiles=2, random_seed=1)
    with pytest.raises(DataError, match="random_seed: 0 then, None now; random_smiles: 2 then, None now"):
        prepare_smiles([str(table)], folder, valid_fraction=0.1)


def test_long_ones_are_counted(table: Path) -> None:
    out = table.parent / "short"
    summary = prepare_smiles([str(table)], out, max_length=40, max_rejected=1.0, random_smiles=2, workers=1)
    counts = summary.manifest["statistics"]["random_smiles"]
    train = texts_of(out, "train")
    assert counts["drawn_again"]["too long"] > 0 and len(train) == 3 * counts["molecules"]
    assert max(len(split_smiles(text)) for text in train) <= 38
    assert "drawn again: " in summary.table() and counts["canonical_instead"] > 0
    assert f"{counts['canonical_instead']:,} times the canonical one instead" in summary.table()


@pytest.mark.parametrize(
    ("kind", "option", "error"),
    [
        ("smiles", ["--random-smiles", "0"], "'0' is not a whole number from 1"),
        ("smiles", ["--random-smiles", "2", "--random-seed", "-1"], "random_seed = -1: must be from 0"),
        ("smiles", ["--random-smiles", "2", "--random-seed", "-1", "--dry-run"], "random_seed = -1: must be from 0"),
        ("text", ["--random-smiles", "2"], "--random-smiles"),
    ],
)
def test_what_cannot_be_is_refused(
    kind: str, option: list[str], error: str, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["prepare", kind, "--input", str(table), "--out", str(table.parent / "none"), *option]
    try:
        code = main(call)
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and error in capsys.readouterr().err and not (table.parent / "none").exists()
    with pytest.raises(ConfigError, match="random_smiles = -1: must be 1 or more"):
        prepare_smiles([str(table)], table.parent / "none", random_smiles=-1)
