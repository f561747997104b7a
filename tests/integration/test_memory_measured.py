"""Predicted against measured: the peak of real training steps on a CPU, in processes of their own.

`benchmarks/memory.py` says what is measured and holds the larger sweep.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the memory figures of Linux")


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    import memory

    yield memory
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


@pytest.mark.parametrize(
    "cases",
    [
        [{"micro": 8}, {"objective": "mlm", "vocabulary": 4096, "micro": 32, "recompute": True}],
        [{"ranks": 2, "zero": 2, "layers": 3, "width": 384, "heads": 6, "micro": 2, "transitions": "sparse"}],
    ],
    ids=["one process", "two ranks"],
)
def test_prediction_is_within_15_percent_of_the_peak(memory, cases):
    cases = [memory.Case(**case) for case in cases]
    for case, peak in zip(cases, memory.measure(cases, timeout=120)):
        assert case.predicted().total == pytest.approx(peak, rel=0.15), case.name
