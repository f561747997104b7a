"""Files of the working folder that have the names of modules: nothing that the command starts imports them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from locations import ROOT

from exlm_dist.utils.search_path import shield_children

SHADOWS = ("random", "socket", "pickle", "queue", "secrets", "data", "utils", "numpy", "yaml", "pydantic")


def test_modules_in_the_working_folder_shadow_none(tmp_path: Path) -> None:
    """The command itself as launchers start it, and its workers, which `multiprocessing` starts with `-c`."""
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the working folder was imported')")
    (tmp_path / "a.smi").write_text("\n".join("C" * length for length in range(1, 700)))
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONSAFEPATH", "RANK")}
    command = [sys.executable, "-m", "exlm_dist.cli", "prepare", "smiles", "--input", "a.smi", "--out", "o"]
    if sys.version_info >= (3, 11):  # only then can the workers be told
        command += ["--workers", "2", "--max-length", "800"]
    for rank in ({}, {"RANK": "0"}):
        result = subprocess.run(
            [*command, "--overwrite"], cwd=tmp_path, env=environment | rank, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0 and "699" in result.stdout, result.stderr


def test_a_checkout_that_is_not_installed_is_found_by_children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", "/other")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    shield_children()
    assert os.environ["PYTHONPATH"] == "/other" and os.environ["PYTHONSAFEPATH"] == "1"
    monkeypatch.chdir(ROOT)
    shield_children()
    assert os.environ["PYTHONPATH"] == f"{ROOT}:/other"
