"""Twenty runs killed at random moments and restarted on random numbers of ranks: benchmarks/chaos.py."""

from __future__ import annotations

import subprocess
import sys

from locations import ROOT


def test_twenty_trials():
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--trials", "20"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=290)
    assert result.returncode == 0 and "20 of 20 trials right" in result.stdout, result.stdout + result.stderr
