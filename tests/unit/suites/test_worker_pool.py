"""Cells in processes: one that dies takes only its own along, and what takes long is named."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from exlm_dist.suites import worker_pool
from exlm_dist.suites.cells import Cell, read_results
from exlm_dist.suites.methods import Method
from exlm_dist.suites.worker_pool import DONE, FAILED, Slot, run_orders


@dataclass(frozen=True)
class Waiting:
    """A cell that takes some seconds; with none its process is killed."""

    out: Path
    cell: Cell
    seconds: float

    def compute(self, device: str, threads: int) -> bool:
        """Wait."""
        if not self.seconds:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        return True


def orders(out: Path, *seconds: float) -> list[Waiting]:
    method = Method("forest", "forest", "forest", None, False, {})
    return [Waiting(out, Cell("bbbp", "scaffold", method, (), seed), each) for seed, each in enumerate(seconds)]


@pytest.mark.parametrize("slots", [1, 2])
def test_what_takes_long_is_named_while_it_does(
    slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker_pool, "PATIENCE", 0.2)
    with caplog.at_level("INFO"):
        found = list(run_orders(orders(tmp_path, 0.01, 0.7), [Slot("cpu", 1)] * slots))
    assert [one.state for one in found] == [DONE, DONE]
    said = [record.getMessage() for record in caplog.records]
    assert "still computing: bbbp scaffold forest seed 1 (0 min)" in said, said
    caplog.clear()
    time.sleep(0.5)
    assert not caplog.records, "it goes on after the end"


def test_a_killed_process_fails_its_own_cell(tmp_path: Path) -> None:
    found = list(run_orders(orders(tmp_path, 0.01, 0, 0.01), [Slot("cpu", 1)] * 2))
    assert {one.order.cell.seed: one.state for one in found} == {0: DONE, 1: FAILED, 2: DONE}
    assert "was killed (for memory? Then give fewer --jobs)" in next(one.reason for one in found if one.state == FAILED)
    _, failures = read_results(tmp_path)
    assert [one["seed"] for one in failures] == [1]
