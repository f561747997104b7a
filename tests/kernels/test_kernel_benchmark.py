"""The benchmark of the kernels at toy size: every side is checked, both tables are written."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

from locations import ROOT


def run(script: str, *arguments: str) -> str:
    """What a benchmark prints; it must succeed."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--toy", "--commit", "test", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_toy_run_checks_every_side_and_writes_both_tables(tmp_path: Path) -> None:
    run("kernels.py", "--rounds", "1", "--milliseconds", "1", "--out", str(tmp_path))
    (table,) = tmp_path.glob("*.csv")
    lines = list(csv.DictReader(table.open()))
    assert {line["case"] for line in lines} == {"attention", "dag", "transitions", "vocab", "gelu gradient"}
    assert not [line for line in lines if line["fault"]]
    assert table.with_suffix(".md").is_file()


def test_other_tiles_are_set_beside_those_that_ship() -> None:
    printed = run("attention_tiles.py")
    assert printed.count("| ours |") == 2 and printed.count("| ours, keys ahead |") == 2 and "left out" not in printed
