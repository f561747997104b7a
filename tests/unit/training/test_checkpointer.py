"""What a run thinks that a save will take."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from exlm_dist.training.checkpointer import Checkpointer


def seconds(parameters: float, ranks: int) -> float:
    """Of a save, where none was measured."""
    checkpointer = object.__new__(Checkpointer)
    checkpointer._engine, checkpointer._process = (
        SimpleNamespace(num_parameters=parameters),
        SimpleNamespace(world=ranks),
    )
    checkpointer.saver, checkpointer._slowest_save = SimpleNamespace(busy=False), 0.0
    return checkpointer.seconds_to_save(due=False)


def test_a_short_job_of_many_ranks_has_time_to_train_before_its_first_save():
    """7B on two nodes in 15 minutes: every rank writes its own part."""
    assert seconds(6.67e9, 16) < 60
    assert seconds(6.67e9, 1) == pytest.approx(800, rel=0.01)
