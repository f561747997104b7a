"""What `benchmarks/train_cpu.py` times are two ways to compute the same."""

from __future__ import annotations

import pytest
from locations import ROOT


@pytest.mark.parametrize("states", [2, 4])
def test_both_sides_have_the_same_loss_and_gradients(monkeypatch, states: int) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import train_cpu

    sizes = {"layers": 2, "width": 32, "length": 24, "shortest": 8, "sequences": 4, "vocabulary": 64, "states": states}
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    monkeypatch.setattr("sys.argv", ["train_cpu.py", *words])
    loss, gradient = train_cpu.check_equal(train_cpu.options())
    assert loss < 1e-9 and 0 < gradient < 1e-6
