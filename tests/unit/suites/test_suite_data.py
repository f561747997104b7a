"""The data of the tasks: which rows are used, which labels, and splits against their definition."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from molecule_table import write_table

from exlm_dist.suites.moleculenet import MOLECULENET
from exlm_dist.suites.suite import Task
from exlm_dist.suites.task_data import TaskData
from exlm_dist.utils.errors import ConfigError, DataError

SHARED = Path(os.environ.get("EXLM_SHARED", "nowhere")) / "data" / "moleculenet"
BBBP, SIDER, ESOL = (MOLECULENET.task(name) for name in ("bbbp", "sider", "esol"))


def found_file(task: Task, folder: Path) -> Path | None:
    (file,) = task.find(folder).values()
    return file


def read(task: Task, file: Path) -> TaskData:
    return task.read((file,))


def test_rows_that_cannot_be_used_are_named_and_doubles_counted(moleculenet: Path) -> None:
    found = found_file(BBBP, moleculenet)
    assert found == moleculenet / "BBBP.csv"
    data = read(BBBP, found)
    assert [(row.row, row.text) for row in data.failed] == [(4, "C1CC")] and len(data.places) == 61
    assert data.described()["rows"] == {"read": 62, "used": 61} and data.described()["duplicates"] == 1
    assert [target.kind for target in data.targets] == ["binary"] and set(data.labels[:, 0]) == {0.0, 1.0}
    parts = data.split("scaffold")
    assert data.described_split(parts)["repeated"] == {"valid": 0, "test": 0}, "one scaffold is in one part"


def test_missing_labels_stay_missing_and_a_column_of_one_class_is_left_out(moleculenet: Path) -> None:
    data = read(SIDER, moleculenet / "sider.csv")
    assert [target.name for target in data.targets] == ["first", "second"] and data.undefined == ("constant",)
    assert np.isnan(data.labels[:, 1]).tolist() == [number % 5 == 0 for number in range(60)]
    counts = data.described_split(data.split("scaffold"))["counts"]
    assert sum(sum(counts[part]["second"].values()) for part in counts) == 48


def test_files_are_found_as_people_have_them(moleculenet: Path, tmp_path: Path) -> None:
    assert found_file(ESOL, moleculenet) == moleculenet / "delaney-processed.csv.gz"
    assert {target.kind for target in read(ESOL, moleculenet / "delaney-processed.csv.gz").targets} == {"regression"}
    raw = tmp_path / "bbbp" / "raw"
    raw.mkdir(parents=True)
    (raw / "BBBP.csv").write_bytes((moleculenet / "BBBP.csv").read_bytes())
    assert found_file(BBBP, tmp_path) == raw / "BBBP.csv"
    (tmp_path / "bbbp.tsv").write_text("")
    with pytest.raises(DataError, match="could each be its file"):
        found_file(BBBP, tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"smiles": "CC", "label": "1"}], "no column 'p_np'"),
        ([{"molecule": "CC", "p_np": "1"}], "no column of molecules"),
        ([{"smiles": "CC", "p_np": "1"}, {"smiles": "CO", "p_np": "1"}], "nothing to predict"),
        ([{"smiles": "C1", "p_np": "1"}, {"smiles": "CO", "p_np": ""}], "2 of 2 rows cannot be used"),
    ],
)
def test_files_of_another_form_are_refused(rows: list[dict[str, str]], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read(BBBP, write_table(tmp_path / "bbbp.csv", rows))


def test_a_part_of_one_class_is_refused_with_a_remedy(tmp_path: Path) -> None:
    rows = [{"smiles": f"{'C' * n}O", "p_np": str(int(n == 1))} for n in range(1, 40)]
    data = read(BBBP, write_table(tmp_path / "bbbp.csv", rows))
    with pytest.raises(DataError, match="Leave random out of --splits"):
        data.split("random")


def test_unknown_tasks_are_named() -> None:
    with pytest.raises(ConfigError, match="no task 'qm9'; it has bbbp, bace"):
        MOLECULENET.task("qm9")


@pytest.mark.parametrize("name", ["bbbp", "esol"])
@pytest.mark.parametrize("chirality", [False, True])
@pytest.mark.skipif(not SHARED.is_dir(), reason="EXLM_SHARED names no folder with data/moleculenet")
def test_scaffold_splits_of_the_real_sets_are_those_computed_with_rdkit_alone(name: str, chirality: bool) -> None:
    from rdkit import Chem
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles

    task = MOLECULENET.task(name)
    file = found_file(task, SHARED)
    assert file is not None
    data = read(task, file)
    groups: dict[str, list[int]] = {}
    for row, smiles in enumerate(data.columns["smiles"]):
        scaffold = MurckoScaffoldSmiles(mol=Chem.MolFromSmiles(smiles), includeChirality=chirality)
        groups.setdefault(scaffold, []).append(row)
    expected: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    for group in sorted(groups.values(), key=lambda rows: (len(rows), rows[0]), reverse=True):
        train, valid = len(expected["train"]), len(expected["valid"])
        if train + len(group) <= 0.8 * len(data.places):
            expected["train"] += group
        elif train + valid + len(group) <= 0.9 * len(data.places):
            expected["valid"] += group
        else:
            expected["test"] += group
    parts = data.split("scaffold-chiral" if chirality else "scaffold")
    assert {part: rows.tolist() for part, rows in parts.items()} == {p: sorted(rows) for p, rows in expected.items()}
    if name == "bbbp":  # the published number of molecules, and the shift of its labels
        assert len(data.places) == 2039
        positive = [data.labels[rows, 0].mean() for rows in parts.values()]
        assert np.round(positive, 2).tolist() == ([0.84, 0.41, 0.53] if chirality else [0.82, 0.55, 0.52])
