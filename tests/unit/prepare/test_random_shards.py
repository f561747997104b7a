"""`exlm data index --random-smiles`: forms of molecules in shards of others, the same at the index and when read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from foreign_shards import npy, text_members, text_tokenizer, write_tar

from exlm_dist.cli import main
from exlm_dist.data.manifest import read_manifest
from exlm_dist.data.opening import open_dataset
from exlm_dist.prepare.demo.drugs import DRUGS
from exlm_dist.prepare.index_shards import index_shards
from exlm_dist.prepare.smiles import prepare_smiles
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.tokenizers.molecules import AtomOrders, canonical_smiles, make_policy
from exlm_dist.tokenizers.smiles_tokenizer import split_smiles
from exlm_dist.utils.errors import ConfigError, DataError

ROWS = list(dict.fromkeys(DRUGS.values()))[:90]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars (the last of lines, gzipped or not), and the same molecules as a prepared folder."""
    root = tmp_path_factory.mktemp("shards")
    (root / "rows.smi").write_text("\n".join(ROWS))
    prepare_smiles([str(root / "rows.smi")], root / "prepared", valid_fraction=0.1, random_smiles=2, workers=1)
    write_tar(root / "s-0.tar", text_members(ROWS[:40]))
    write_tar(root / "s-1.tar", text_members(ROWS[40:60]))
    write_tar(root / "s-2.tar", [("a.smi", "\n".join(ROWS[60:80]).encode()), *text_members(ROWS[80:])])
    return root


def indexed(root: Path, name: str, **settings) -> Path:
    given = {"valid_fraction": 0.1, "random_smiles": 2, "workers": 1, "endings": ["txt", "smi"], **settings}
    index_shards([str(root / "s-{0..2}.tar")], root / name, tokenizer=root / "prepared", **given)
    return root / name


def texts_of(folder: Path, split: str) -> list[str]:
    dataset = open_dataset(folder, split)
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    tokens, lengths = dataset.read(np.arange(len(dataset)))
    assert np.array_equal(lengths, dataset.lengths[:])
    return [tokenizer.decode(part) for part in np.split(tokens, np.cumsum(lengths)[:-1])]


def test_the_forms_are_those_of_a_prepared_folder(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = indexed(root, "indexed")
    train = texts_of(folder, "train")
    assert train == texts_of(root / "prepared", "train") and texts_of(folder, "valid") == texts_of(
        root / "prepared", "valid"
    )
    mine, theirs = (read_manifest(root / name) for name in ("indexed", "prepared"))
    assert mine["splits"]["train"]["forms"] == 3 and "forms" not in mine["splits"]["valid"]
    assert mine["random_smiles"] == {"count": 2, "seed": 0}
    for split in ("train", "valid"):
        histograms = [manifest["splits"][split]["length_histogram"] for manifest in (mine, theirs)]
        assert histograms[0] == histograms[1]
    counts = mine["statistics"]["random_smiles"]
    assert counts["molecules"] == len(ROWS) and counts["drawn_again"] == {} and counts["canonical_instead"] == 0
    assert main(["data", "verify", str(folder)]) == 0
    assert main(["data", "sample", str(folder), "--count", "300"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {text}\n" in shown for text in train)
    assert read_manifest(indexed(root, "two", workers=2))["fingerprint"] == mine["fingerprint"]
    with pytest.raises(DataError, match="random_smiles: 2 then, 3 now"):
        indexed(root, "indexed", random_smiles=3)


def test_a_molecule_without_room_for_others_keeps_its_canonical_form(root: Path) -> None:
    folder = indexed(root, "short", max_length=40, max_rejected=1.0, random_seed=5)
    train = texts_of(folder, "train")
    manifest = read_manifest(folder)
    count = manifest["splits"]["train"]["sequences"] // 3
    assert len(train) == 3 * count and max(len(split_smiles(text)) for text in train) <= 38
    policy = make_policy()
    for form in (1, 2):
        texts = train[form * count : (form + 1) * count]
        assert [canonical_smiles(text, policy) for text in texts] == train[:count] != texts
    statistics = manifest["statistics"]["random_smiles"]
    assert statistics["drawn_again"]["too long"] > 0 and statistics["canonical_instead"] > 0


def test_what_another_rdkit_writes_is_not_trained_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(indexed(root, "other"), "train")
    write = AtomOrders.smiles
    monkeypatch.setattr(AtomOrders, "smiles", lambda self, order: write(self, order) + ".O")
    canonical = np.arange(dataset.epoch_size)
    assert dataset.read(canonical)[1].sum() == dataset.lengths[canonical].sum()
    with pytest.raises(DataError, match=r"gives \d+ tokens, \d+ by the index: .* RDKit. Index the shards again"):
        dataset.read(canonical + dataset.epoch_size)


def test_what_are_no_smiles_is_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = text_tokenizer(tmp_path / "text")
    call = ["data", "index", str(root / "s-0.tar"), "--out", str(tmp_path / "o"), "--random-smiles", "2"]
    assert main([*call, "--tokenizer", str(text)]) == 2
    assert "is a text tokenizer. Leave the option out, or give --tokenizer a folder" in capsys.readouterr().err
    write_tar(tmp_path / "ids.tar", [("a.npy", npy(np.arange(5, 9)))])
    with pytest.raises(ConfigError, match="members .npy hold token ids, not SMILES"):
        index_shards([str(tmp_path / "ids.tar")], tmp_path / "o", tokenizer=root / "prepared", random_smiles=2)
    assert not (tmp_path / "o").exists()
