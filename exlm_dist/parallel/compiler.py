"""Starting without the compiler of torch: half of what a rank would import, and no step here uses it; and where Triton
keeps what it compiles.

The seconds given are what each measure saves of the start of a rank: 2.5 s up to its first step, for a tiny model on
one CPU core.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

COMPILER = "torch._dynamo"


class _NotLoaded(ModuleType):
    """Stands in for the compiler: the two functions by which torch's optimizers and DeepSpeed keep it out of their
    code. Whoever asks for anything else (activation checkpointing does) gets the real module."""

    def __init__(self) -> None:
        super().__init__(COMPILER)
        self.__spec__ = importlib.util.find_spec(COMPILER)

    @staticmethod
    def disable(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Callable[..., Any]:
        """The function itself: there is no compiler to keep out of it."""
        return function if function is not None else lambda inner: inner

    @staticmethod
    def graph_break(*_: Any, **__: Any) -> None:
        """Nothing: there is no graph."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # `inspect` looks at every loaded module
            raise AttributeError(f"{COMPILER} is not loaded and has no {name} yet")
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER], torch._dynamo
        return getattr(importlib.import_module(COMPILER), name)


def leave_compiler_unloaded() -> None:
    """Put off loading the compiler until something compiles: 1.6 s per rank, at every restart.

    To be called once there is a process group: making one, torch takes the name in `sys.modules` for the module.
    """
    if COMPILER not in sys.modules:
        torch._dynamo = sys.modules[COMPILER] = _NotLoaded()


@contextlib.contextmanager
def decorators_without_compiler() -> Iterator[None]:
    """Inside, `torch.compile` returns functions as they are: for importing modules that decorate some which never run
    here. Without it each such import loads the compiler: 2.9 s for DeepSpeed's, 2.0 s for megatron's alone."""
    plain = torch.compile
    uncompiled: Any = lambda function=None, **_: function or (lambda inner: inner)  # noqa: E731
    torch.compile = uncompiled
    try:
        yield
    finally:
        torch.compile = plain


def compile_on_this_node() -> None:
    """Let Triton keep compiled kernels in a folder of this node that is this user's alone. By default all ranks of all
    nodes compile into one folder of the home directory, at the same moment. A TRITON_CACHE_DIR that is set stays.

    A folder that others could write to, or from which nothing may be run (Triton keeps code there), is not used.
    """
    if "TRITON_CACHE_DIR" in os.environ:
        return
    folder = Path(tempfile.gettempdir()) / f"exlm-triton-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        about, system = folder.lstat(), os.statvfs(folder)
    except OSError:
        return  # a full or missing /tmp: Triton's own place
    private = stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o077
    if private and not system.f_flag & os.ST_NOEXEC:
        os.environ["TRITON_CACHE_DIR"] = str(folder)
