"""The benchmarks of data run at toy size, with ours alone; their times mean nothing here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from locations import ROOT

from exlm_dist.data import shard_files
from exlm_dist.prepare.demo.demo_molecules import prepare_demo_smiles


@pytest.fixture(scope="module")
def molecules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks") / "molecules"
    prepare_demo_smiles(out=folder, count=700, max_length=128, workers=1, overwrite=False)
    return folder


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch) -> None:
    for folder in ("benchmarks", "benchmarks/data_readers"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


def test_ours_delivers_what_the_other_libraries_must_deliver(molecules: Path, tmp_path: Path, capsys) -> None:
    import data_libraries

    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "rows.csv"), "--data", str(molecules)]
    sizes = ["--libraries", "ours", "--resume-samples", "1000", "--rounds", "1"]
    data_libraries.main(["write", "index", "same", "tars", "resume", "flip", "table", *places, *sizes])
    shown = capsys.readouterr().out
    assert "ours, own: each of" in shown and "ours, tars: each of" in shown
    assert "| ours packed |" in shown and "replaced by a whole one" in shown.splitlines()[-6]


def test_waiting_on_slow_storage_is_measured(molecules: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    import data_waiting

    monkeypatch.setattr(shard_files, "os", os)  # as it was, at the end
    monkeypatch.setenv(data_waiting.DELAYS, "")
    quick = ["--steps", "3", "--step-ms", "1", "--open-ms", "1", "--read-ms", "1"]
    data_waiting.main(["--prepared", str(molecules), *quick, "--out", str(tmp_path / "rows.csv")])
    rows = (tmp_path / "rows.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [["tokens", "windows"], ["tokens", "full"]]
    assert "waiting" in capsys.readouterr().out


def test_a_soak_tells_slopes(molecules: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    import data_soak

    monkeypatch.setattr(data_soak, "EVERY", 500)
    data_soak.main(["--prepared", str(molecules), "--samples", "2000", "--out", str(tmp_path / "rows.csv")])
    assert "descriptors" in capsys.readouterr().out
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 5
