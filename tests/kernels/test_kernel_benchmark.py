"""The benchmark of the kernels runs at toy size: every side is checked, both tables are written."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

from locations import ROOT


def test_toy_run_checks_every_side_and_writes_both_tables(tmp_path: Path) -> None:
    command = [
        sys.executable, str(ROOT / "benchmarks" / "kernels.py"), "dag", "transitions", "vocab", "elementwise", "--toy",
        "--rounds", "1", "--milliseconds", "1", "--commit", "test", "--out", str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    (table,) = tmp_path.glob("*.csv")
    lines = list(csv.DictReader(table.open()))
    assert {line["case"] for line in lines} == {"dag", "transitions", "vocab", "gelu gradient"}
    assert not [line for line in lines if line["fault"]]
    assert table.with_suffix(".md").is_file()
