"""Fixtures of all tests: where the reference data is, quiet libraries, and which package is under test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from locations import ROOT, shared_path

# Ranks and commands that tests start import the package of this checkout, whatever is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("WDS_SECURE", "1")
# Under nohup the tests, and all that they start, would ignore a closed terminal; in the background of a script, Ctrl-C.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
if not Path("/dev/nvidiactl").exists():
    # Read when triton is first imported, by whichever test that is.
    os.environ.setdefault("TRITON_INTERPRET", "0" if "EXLM_EMULATE" in os.environ else "1")


def pytest_configure(config: pytest.Config) -> None:
    """With EXLM_EMULATE=80 or 90 kernels are compiled for that GPU and run from their PTX (tests/ptx)."""
    chosen = os.environ.get("EXLM_EMULATE")
    if chosen is None:
        return
    from ptx.driver import install

    from exlm_dist.kernels import launch

    launch.DEFAULT_CAPABILITY = (int(chosen[:-1]), int(chosen[-1]))
    install(launch.DEFAULT_CAPABILITY)


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Give back the environment after each test. `exlm`, called in a test's own process, sets variables for the
    processes that it starts; with PYTHONSAFEPATH a script that a later test runs does not find the files beside it."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the reference data; the test is skipped where it is absent."""
    path = shared_path()
    if not path.is_dir():
        pytest.skip(f"no reference data at {path} (set EXLM_SHARED)")
    return path


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with a reason, tests marked `slow` unless asked for, and those marked `gpu` without a CUDA device."""
    if "slow" not in config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: run it with -m slow"))
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
