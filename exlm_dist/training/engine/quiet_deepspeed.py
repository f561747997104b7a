"""DeepSpeed imported and used without its noise, its needless imports and its compilations.

The seconds given are what each measure saves of the start of a rank: 2.5 s up to its first step, for a tiny model on
one CPU core.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

from exlm_dist.parallel.compiler import decorators_without_compiler
from exlm_dist.utils.logs import get_logger

logger = get_logger(__name__)


@contextlib.contextmanager
def quiet_deepspeed() -> Iterator[ModuleType]:
    """The package `deepspeed`; inside, what it prints and warns of is dropped."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    # DeepSpeed calls functions that newer versions of torch have renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*")
    # stdout: DeepSpeed prints and asks compilers for their versions; warnings: of packages that are not needed.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _hidden("mlflow"):  # its autotuner would import it: 1.6 s
            import deepspeed
        import deepspeed.ops
        from deepspeed.utils import logger as noisy

        noisy.setLevel(getattr(logging, os.environ["DEEPSPEED_LOG_LEVEL"].upper(), logging.ERROR))
        # No extension counts as compatible: its shared-memory all-reduce is compiled at start (a minute), and a rank
        # killed meanwhile leaves a lock on which every later process waits for ever. Asking which extensions are
        # compatible runs compilers, whose folders a killed rank leaves behind too.
        deepspeed.ops.__compatible_ops__ = {}
        _import_muon()
        yield deepspeed


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Inside, importing `module` fails, unless it was imported before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # how Python marks a module that cannot be imported
    try:
        yield
    finally:
        del sys.modules[module]


def _import_muon() -> None:
    """DeepSpeed imports its Muon optimizer to see that ours is a different one; its functions are marked for
    `torch.compile`, which would load the compiler: 2.9 s."""
    with decorators_without_compiler():
        try:
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
        except ImportError:
            logger.debug("this version of DeepSpeed has no Muon")
