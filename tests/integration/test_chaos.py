"""Twenty runs killed at random moments and restarted on random numbers of ranks: benchmarks/chaos.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
from locations import ROOT


@pytest.mark.timeout(600)
def test_twenty_trials():
    """Ten in each of two processes: a trial spends half of its time waiting."""
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--trials", "10", "--seed"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    halves = [subprocess.Popen([*command, seed], **pipes) for seed in ("0", "10")]
    try:
        for half in halves:
            text, _ = half.communicate(timeout=560)
            assert half.returncode == 0 and "10 of 10 trials right" in text, text
    finally:
        for half in halves:
            half.kill()
            half.wait()
