"""Kernels compile without a GPU for three generations, spill no registers and fit in shared memory.

A quick selection of each operation runs here; the whole table is `python tests/kernels/ahead_of_time.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parent / "ahead_of_time.py"
QUICK = {
    "attention": "P64 bf16 dropout 0.1",
    "dag": "N21 L84 ends 1",
    "transitions": "P64 bf16 dense",
    "vocab": "D768 bf16",
}
OPERATIONS = sorted(path.stem.removeprefix("shipped_") for path in SCRIPT.parent.glob("shipped_*.py"))


TARGETS = ("80", "90", "100")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_shipped_configurations_compile_without_spills(operation: str) -> None:
    """In a process of its own: the interpreter that other tests use and the compiler exclude each other."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    argv = [sys.executable, str(SCRIPT), operation, "--targets", *TARGETS, "--select", QUICK.get(operation, "")]
    found = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    for target in TARGETS:
        rows = [line for line in found.stdout.splitlines() if f" sm_{target} " in line]
        assert rows and all(" ok " in row for row in rows)
