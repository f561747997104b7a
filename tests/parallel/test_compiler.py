"""A rank starts, trains and saves without loading the compiler of torch; what asks for it gets it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from integration.training_runs import _train, tiny
from made_run import make_data
from parallel.harness import run_processes

REAL = """
import sys
import torch
from exlm_dist.parallel.compiler import decorators_without_compiler, leave_compiler_unloaded

leave_compiler_unloaded()
parameter = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.AdamW([parameter])
parameter.sum().backward()
optimizer.step()
with decorators_without_compiler():
    assert torch.compile(abs) is abs and torch.compile(fullgraph=True)(abs) is abs
assert "torch._dynamo.config" not in sys.modules
assert torch.compile(lambda x: x * 2 + 1, backend="eager")(torch.ones(2)).tolist() == [3.0, 3.0]
assert sys.modules["torch._dynamo"] is torch._dynamo and torch._dynamo.config.suppress_errors is False
optimizer.step()
"""


def test_whoever_compiles_gets_the_compiler():
    result = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def loaded(rank, settings):
    return _train(rank, settings, None), "torch._dynamo.config" in sys.modules


@pytest.mark.parametrize("world, parallel", [(1, {"zero": 3}), (2, {"tensor": 2}), (2, {"pipeline": 2})])
def test_no_layout_loads_it(world, parallel, tmp_path):
    config = tiny(tmp_path, "run", make_data(tmp_path / "data"), parallel=parallel)
    assert run_processes(loaded, world, config.model_dump(), timeout=60) == [(0, False)] * world
