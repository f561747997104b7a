"""Where threads that parted at a branch meet again."""

from __future__ import annotations

import functools

from ptx.parse import Instruction, Kernel


def _next(instruction: Instruction, place: int, kernel: Kernel) -> list[int]:
    """Places that can follow an instruction; -1 is the end."""
    name = instruction.name.split(".")[0]
    if name in ("ret", "exit"):
        return [-1] if instruction.guard is None else [-1, place + 1]
    if name == "bra":
        target = kernel.labels[instruction.operands[0].name]
        return [target] if instruction.guard is None else [place + 1, target]
    return [place + 1]


@functools.lru_cache(maxsize=4096)
def meeting(kernel: Kernel, place: int) -> int:
    """The first instruction that every way from the branch at `place` to the end goes through; -1 if only the end."""
    starts, after = _blocks(kernel)
    own = max(start for start in starts if start <= place)
    always = _postdominators(starts, after)
    later = always[own] - {own}
    # of these the nearest: all the others come after it
    return next(block for block in later if always[block] == later)


def _blocks(kernel: Kernel) -> tuple[list[int], dict[int, list[int]]]:
    """First instructions of the straight pieces of code, and the pieces that can follow each."""
    count = len(kernel.code)
    starts = {0, *kernel.labels.values()} - {count}
    starts |= {place + 1 for place, item in enumerate(kernel.code) if item.name.split(".")[0] in ("bra", "ret", "exit")}
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
