"""`benchmarks/gpu.py`: parts at toy size, what is run again, and the limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from locations import ROOT


def run(out: Path, *arguments: str, status: int = 0) -> str:
    command = [
        sys.executable,
        str(ROOT / "benchmarks/gpu.py"),
        "--toy",
        "--commit",
        "abc",
        "--out",
        str(out),
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_parts_write_one_table_and_are_not_run_twice(tmp_path: Path) -> None:
    parts = ["environment", "kernels-dag", "kernels-transitions", "trainer"]
    run(tmp_path, *parts)
    records = {name: json.loads((tmp_path / name / "result.json").read_text()) for name in parts}
    assert {record["status"] for record in records.values()} == {"done"}
    rows = {row["quantity"]: row for record in records.values() for row in record["rows"]}
    assert rows["commit"]["measured"] == "abc"
    resumed = rows["files of the resumed run equal to the bit"]
    assert resumed["measured"] == "2 of 2" and resumed["asked"] == "2"
    table = (tmp_path / "README.md").read_text()
    assert "| dag: as called, B=2, N=3, L=12: best other side / ours |" in table and "## trainer" in table
    before = (tmp_path / "kernels-dag" / "result.json").stat().st_mtime_ns
    run(tmp_path, "kernels-dag")
    assert (tmp_path / "kernels-dag" / "result.json").stat().st_mtime_ns == before
    run(tmp_path, "kernels-dag", "--again")
    assert (tmp_path / "kernels-dag" / "result.json").stat().st_mtime_ns > before


def test_a_failed_part_names_its_log_and_is_run_again(tmp_path: Path) -> None:
    printed = run(tmp_path, "trainer", "--data", str(tmp_path / "none"), status=1)
    assert "failed, see trainer/log.txt" in printed
    assert "none" in (tmp_path / "trainer" / "log.txt").read_text()


def test_without_time_left_nothing_is_started(tmp_path: Path) -> None:
    assert "out of time" in run(tmp_path, "kernels-dag", "--limit", "1", status=1)
    assert not (tmp_path / "kernels-dag").exists()
