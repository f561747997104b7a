"""A rank starts, trains and saves without loading the compiler of torch; what asks for it gets it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from integration.training_runs import _train, tiny
from made_run import make_data
from parallel.harness import run_processes

from exlm_dist.parallel.compiler import compile_on_this_node

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


@pytest.fixture
def own_temporary(tmp_path, monkeypatch):
    """A folder for temporary files, and no place for kernels that is set; the environment is given back."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_kernels_are_kept_on_the_node_for_this_user_alone(own_temporary):
    compile_on_this_node()
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    assert folder.parent == own_temporary and folder.stat().st_mode & 0o777 == 0o700
    os.environ["TRITON_CACHE_DIR"] = "elsewhere"
    compile_on_this_node()
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"


@pytest.mark.parametrize("how", ["open to others", "a link", "not executable", "a file"])
def test_code_is_not_kept_where_others_may_write_or_nothing_may_run(how, own_temporary, monkeypatch):
    folder = own_temporary / f"exlm-triton-{os.getuid()}"
    if how == "open to others":
        folder.mkdir()
        folder.chmod(0o770)
    elif how == "a link":
        (own_temporary / "theirs").mkdir(mode=0o700)
        folder.symlink_to(own_temporary / "theirs")
    elif how == "a file":
        folder.touch()
    else:
        monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
    compile_on_this_node()
    assert "TRITON_CACHE_DIR" not in os.environ


def loaded(rank, settings):
    return _train(rank, settings, None), "torch._dynamo.config" in sys.modules


@pytest.mark.parametrize("world, parallel", [(1, {"zero": 3}), (2, {"tensor": 2}), (2, {"pipeline": 2})])
def test_no_layout_loads_it(world, parallel, tmp_path):
    config = tiny(tmp_path, "run", make_data(tmp_path / "data"), parallel=parallel)
    assert run_processes(loaded, world, config.model_dump(), timeout=60) == [(0, False)] * world
