"""Starting on a CPU without the compiler of torch: half of what a rank would import, and no step here uses it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

COMPILER = "torch._dynamo"


class _NotLoaded(ModuleType):
    """In the place of the compiler: the two functions by which torch's optimizers and DeepSpeed keep it out of their
    code. Whoever asks for anything else (activation checkpointing does) gets the real module."""

    def __init__(self) -> None:
        super().__init__(COMPILER)
        self.__spec__ = importlib.util.find_spec(COMPILER)

    @staticmethod
    def disable(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Callable[..., Any]:
        """The function itself: there is no compiler that would have to pass it by."""
        return function if function is not None else lambda inner: inner

    @staticmethod
    def graph_break(*_: Any, **__: Any) -> None:
        """Nothing: there is no graph."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # `inspect` looks at every module there is
            raise AttributeError(f"{COMPILER} is not loaded and has no {name} yet")
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER], torch._dynamo
        return getattr(importlib.import_module(COMPILER), name)


def leave_compiler_unloaded() -> None:
    """Put off loading the compiler until something compiles (a second per rank, spent at every restart).

    To be called when the process group is there: torch takes the name in `sys.modules` for the module when it makes it.
    """
    if COMPILER not in sys.modules:
        torch._dynamo = sys.modules[COMPILER] = _NotLoaded()


@contextlib.contextmanager
def decorators_without_compiler() -> Iterator[None]:
    """Inside, functions marked for `torch.compile` are left as they are: for importing modules that mark some which
    never run here."""
    plain = torch.compile
    torch.compile = lambda function=None, **_: function or (lambda inner: inner)
    try:
        yield
    finally:
        torch.compile = plain
