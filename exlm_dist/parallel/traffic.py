"""Counts what a rank sends: calls and bytes of every collective inside a `with` block, by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

#: Operations of torch's process groups -> (name, index of the argument that is the full tensor exchanged).
_KINDS = {
    "allreduce_": ("all_reduce", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
    "send": ("send", 0),
}


class Traffic(TorchDispatchMode):
    """`with Traffic() as traffic:` fills `calls` and `bytes`, by kind of collective.

    Bytes are those of the tensor of an all-reduce, a broadcast or a send, and of the full tensor of an all-gather or a
    reduce-scatter. In a ring of p ranks each sends 2 (p - 1) / p of them for an all-reduce, (p - 1) / p for the other
    two. A group of one rank sends nothing, and nothing is counted. Counts only in the thread that entered the block: on
    a GPU the backward pass runs in another one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Count a collective; run everything."""
        if function.namespace == "c10d" and function._opname in _KINDS and _ranks(args) > 1:
            kind, index = _KINDS[function._opname]
            self.calls[kind] += 1
            self.bytes[kind] += sum(tensor.nbytes for tensor in _tensors(args[index]))
        return function(*args, **(kwargs or {}))


def _ranks(args: tuple) -> int:
    """Ranks of the group that a collective is called on."""
    group = next(argument for argument in args if isinstance(argument, torch.ScriptObject))
    return dist.ProcessGroup.unbox(group).size()


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for part in argument:
            yield from _tensors(part)
