"""Tiny runs of both objectives, and a folder of data sets as they are downloaded."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from made_run import make_config, make_data, make_run
from molecule_table import write_table

from exlm_dist.suites import fingerprints

MODEL = {"layers": 1, "width": 16, "heads": 2, "ffn": 32, "max_positions": 48}


def ring_molecules() -> list[str]:
    """60 molecules: rings of 3 to 7 atoms, of which one may be another element, each with three substituents. Each ring
    is a scaffold of its own."""
    return [
        f"{substituent}C1{'C' * size}{atom}1"
        for size in range(1, 6)
        for atom in ("C", "N", "O", "S")
        for substituent in ("C", "FCC", "FC(C)C")
    ]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Run folders of an ExLM and of a plain model, with one checkpoint each."""
    folder = tmp_path_factory.mktemp("suite-runs")
    data = make_data(folder / "data")
    exlm = make_config(folder, "tiny_exlm", data, model={**MODEL, "objective": "exlm", "states": 4})
    plain = {**MODEL, "objective": "mlm", "states": 1, "anchors": False}
    return make_run(exlm), make_run(make_config(folder, "tiny_mlm", data, "mlm", model=plain))


@pytest.fixture(scope="session")
def moleculenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BBBP with a row that is no molecule and one that is there twice, SIDER with missing labels and a column of one
    class, ESOL compressed and with the name that MoleculeNet gives it."""
    folder = tmp_path_factory.mktemp("moleculenet")
    molecules = ring_molecules()
    labels = {smiles: int("F" in smiles) for smiles in molecules}
    bbbp = [{"num": n, "name": f"m{n}", "p_np": labels[smiles], "smiles": smiles} for n, smiles in enumerate(molecules)]
    bbbp.insert(3, {"num": 99, "name": "broken", "p_np": 1, "smiles": "C1CC"})
    bbbp.append({"num": 98, "name": "again", "p_np": labels[molecules[0]], "smiles": "C1CC1C"})
    write_table(folder / "BBBP.csv", [{name: str(value) for name, value in row.items()} for row in bbbp])
    sider = [
        {
            "smiles": smiles,
            "first": str(labels[smiles]),
            "second": "" if number % 5 == 0 else str(number % 2),
            "constant": "1",
        }
        for number, smiles in enumerate(molecules)
    ]
    write_table(folder / "sider.csv", sider)
    target = "measured log solubility in mols per litre"
    esol = [{"Compound ID": smiles, target: f"{-len(smiles) / 3:.3f}", "smiles": smiles} for smiles in molecules]
    plain = write_table(folder / "plain.txt", esol)
    (folder / "delaney-processed.csv.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    return folder


@pytest.fixture(autouse=True)
def few_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forests that take no time."""
    monkeypatch.setattr(fingerprints, "TREES", 20)


@pytest.fixture
def arguments(runs: tuple[Path, Path], moleculenet: Path, tmp_path: Path) -> list[str]:
    """An evaluation of a few seconds, into tmp_path/out."""
    return [
        *("evaluate", "moleculenet", "--checkpoint", *map(str, runs), "random", "fingerprints"),
        *("--data", str(moleculenet), "--out", str(tmp_path / "out"), "--tasks", "bbbp", "--splits", "scaffold"),
        *("--seeds", "2", "--grid", "epochs=1", "batch=16", "lr=0.01", "--jobs", "1", "--device", "cpu"),
    ]
