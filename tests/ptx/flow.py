"""Where threads that diverged at a branch converge again."""

from __future__ import annotations

import functools

from ptx.parse import Instruction, Kernel


def _next(instruction: Instruction, index: int, kernel: Kernel) -> list[int]:
    """Indices of instructions that can follow this one; -1 is the end."""
    name = instruction.name.split(".")[0]
    if name in ("ret", "exit"):
        return [-1] if instruction.guard is None else [-1, index + 1]
    if name == "bra":
        target = kernel.labels[instruction.operands[0].name]
        return [target] if instruction.guard is None else [index + 1, target]
    return [index + 1]


@functools.lru_cache(maxsize=4096)
def meeting(kernel: Kernel, branch: int) -> int:
    """The first instruction on every path from the instruction `branch` to the end; -1 if that is only the end."""
    starts, after = _blocks(kernel)
    own = max(start for start in starts if start <= branch)
    always = _postdominators(starts, after)
    later = always[own] - {own}
    # of these the nearest: all the others come after it
    return next(block for block in later if always[block] == later)


def _blocks(kernel: Kernel) -> tuple[list[int], dict[int, list[int]]]:
    """First instructions of the basic blocks, and the blocks that can follow each."""
    count = len(kernel.code)
    starts = {0, *kernel.labels.values()} - {count}
    starts |= {index + 1 for index, item in enumerate(kernel.code) if item.name.split(".")[0] in ("bra", "ret", "exit")}
    ordered = sorted(start for start in starts if start < count)
    ends = [*ordered[1:], count]
    after = {start: _next(kernel.code[end - 1], end - 1, kernel) for start, end in zip(ordered, ends)}
    return ordered, after


def _postdominators(starts: list[int], after: dict[int, list[int]]) -> dict[int, frozenset[int]]:
    everything = frozenset([-1, *starts])
    found = {start: everything for start in starts} | {-1: frozenset([-1])}
    changed = True
    while changed:
        changed = False
        for start in reversed(starts):
            new = frozenset.intersection(*[found[follower] for follower in after[start]]) | {start}
            changed |= new != found[start]
            found[start] = new
    return found
