"""`exlm prepare --dry-run`: what it shows is what the preparation then does, and nothing is written."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from exlm_dist.cli import main


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["prepare", *arguments]) == 0
    return capsys.readouterr().out


def test_molecules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{n};{'C' * n}" for n in range(1, 40)] + ["x;C1CC", "y;" + "C" * 200, "z;"]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\n".join(rows).encode("utf-16")))
    call = ["smiles", "--input", str(tmp_path / "a.txt.gz"), "--out", str(tmp_path / "o"), "--delimiter", ";"]
    call += ["--no-header", "--column", "2", "--max-rejected", "0.1", "--workers", "1"]
    text = shown(capsys, *call, "--dry-run")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt.gz"]
    assert "csv, compressed (.gz), UTF-16, ';' between columns, no header, column '2' of '1', '2'" in text
    assert "row 1: 'C'\n" in text and "row 3: 'CCC'\n" in text and "row 4: " not in text
    assert "of the first 42 rows 39 would be kept, 3 set aside (1 empty, 1 not SMILES, 1 too long)" in text
    assert "row 40 would be set aside: not SMILES: 'C1CC'" in text and "--max-rejected" not in text
    done = shown(capsys, *call)
    assert re.search(r"kept +39\b", done) and "3 (1 empty, 1 not SMILES, 1 too long)" in done
    call[call.index("0.1")] = "0.05"
    assert "that is more than --max-rejected 0.05 allows" in shown(capsys, *call, "--dry-run", "--overwrite")


def test_text_and_many_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(25):
        (tmp_path / f"{number:02}.txt").write_text(f"words  of\n{number}\n\nand more\n")
    out = str(tmp_path / "o")
    text = shown(capsys, "text", "--input", str(tmp_path / "*.txt"), "--out", out, "--dry-run")
    assert "00.txt: txt, UTF-8\n  row 1: 'words of'\n  row 2: '0'\n  row 4: 'and more'\n  of the first 3 rows 3" in text
    assert "19.txt" in text and "20.txt" not in text and "and 5 more files" in text


def test_the_same_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("id,smiles\n1,C\n")
    call = ["prepare", "smiles", "--input", str(tmp_path / "a.csv"), "--dry-run", "--out"]
    assert main([*call, str(tmp_path / "o"), "--column", "smile"]) == 77
    assert "did you mean 'smiles'" in capsys.readouterr().err
    assert main([*call, "/proc/new/o"]) == 2 and "nothing can be written in /proc" in capsys.readouterr().err
