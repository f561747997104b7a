"""Blocks of threads that run a parsed kernel; every register is an array over the threads of the block.

All warps run the code in lockstep, which a real GPU need not do: whatever depends on that shows as a race in
`memory.py`. Registers and shared memory start as NaN. Form and meaning of the instructions: NVIDIA, "PTX ISA".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx.flow import meeting
from ptx.memory import GlobalMemory, MemoryFault, Moment, Race, Space
from ptx.parse import Address, Immediate, Instruction, Kernel, Register, Symbol, parse

#: Start of shared memory. Not 0, so that a missing address shows; a multiple of the alignment of swizzled tiles.
SHARED = 1024
#: Addresses of parameters are this far apart.
PARAMETER = 256
#: Instructions of one block after which it is considered to hang.
PATIENCE = 20_000_000
TYPES = {
    "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "b32": "u4", "u32": "u4",
    "s32": "i4", "f32": "f4", "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8", "pred": "?", "bf16": "u2",
    "bf16x2": "u4", "f16x2": "u4", "f32x2": "u8",
}  # fmt: skip
_POISON = {1: False, 8: 0xFF, 16: 0xFFFF, 32: 0xFFFFFFFF, 64: 0xFFFFFFFFFFFFFFFF}

Step = Callable[["Machine"], "int | None"]
Builder = Callable[[Instruction, Kernel], Step]
BUILDERS: dict[str, Builder] = {}


class Unknown(Exception):
    """An instruction, or a use of one, that this machine does not implement."""


@dataclass
class Machine:
    """One kernel with its arguments as bits, in order; a struct is any object."""

    kernel: Kernel
    steps: Sequence[Step]
    grid: tuple[int, int, int]
    arguments: list[Any]
    memory: GlobalMemory
    shared_bytes: int

    def run(self) -> None:
        """All blocks of the grid, one after the other."""
        self.threads = self.kernel.threads
        self.lanes = np.arange(self.threads)
        for number in range(self.grid[0] * self.grid[1] * self.grid[2]):
            self._run_block(number)

    def _run_block(self, number: int) -> None:
        x, y, _ = self.grid
        self.block, self.epoch = number, 0
        self.active = self.mask = None  # None: all threads
        self.meet = -2  # where the active threads wait for those of `waiting`; here nowhere
        self.waiting: list[tuple[int, int, np.ndarray | None]] = []  # their meet, where they are, which they are
        self.block_index = (number % x, number // x % y, number // (x * y))
        self.warps = self.lanes // 32 + number * (self.threads // 32)
        self.shared = Space("shared memory", np.full(self.shared_bytes, 0xFF, np.uint8), SHARED)
        self.copies: list[tuple] = []  # issued, not yet in a group
        self.groups: list[list[tuple]] = []
        self.barriers: dict[int, Any] = {}
        self.registers = {
            name: np.full(self.threads, _POISON[bits], f"u{bits // 8}" if bits > 1 else "?")
            for name, bits in self.kernel.registers.items()
        }
        at = 0
        for _ in range(PATIENCE):
            try:
                chosen = self.steps[at](self)
            except (MemoryFault, Race, Unknown) as error:
                error.add_note(f"{self.kernel.name}, block {self.block_index}: {self.kernel.code[at].text}")
                raise
            at = at + 1 if chosen is None else chosen
            while at == self.meet:
                self.meet, at, self.active = self.waiting.pop()
                self.mask = self.active
            if at < 0:
                return
        raise Unknown(f"block {self.block_index} of {self.kernel.name} does not end")

    def part(self, taken: np.ndarray, branch: int, target: int) -> None:
        """Some threads will go to `target`; first the others continue from the branch, until they meet."""
        everyone = np.ones(self.threads, bool) if self.active is None else self.active
        meet = meeting(self.kernel, branch)
        self.waiting.append((self.meet, meet, self.active))
        self.waiting.append((meet, target, everyone & taken))
        self.meet, self.active = meet, everyone & ~taken
        self.mask = self.active

    def whole(self, instruction: Instruction) -> None:
        """`Unknown` unless all threads are active, as operations of a whole warp require."""
        if self.mask is not None:
            raise Unknown(f"not all threads come to {instruction.text}")

    def write(self, target: Register | None, value: np.ndarray) -> None:
        """Set a register in the active threads; the value has the register's width."""
        if target is None:
            return
        value = value.astype("?") if target.bits == 1 else value
        if target.bits > 1 and value.dtype.itemsize * 8 != target.bits:
            raise Unknown(f"{value.dtype} into {target.bits} bits")
        bits = value if target.bits == 1 else value.view(f"u{target.bits // 8}")
        if self.mask is not None:
            bits = np.where(self.mask, bits, self.registers[target.name])
        self.registers[target.name] = bits if len(bits) == self.threads else np.broadcast_to(bits, (self.threads,))

    def acting(self, values: np.ndarray) -> np.ndarray:
        """Those of the active threads, of one value per thread."""
        values = np.broadcast_to(values, (self.threads, *values.shape[1:])) if len(values) == 1 else values
        return values if self.mask is None else values[self.mask]

    def moment(self) -> Moment:
        """The active threads, now."""
        return Moment(self.acting(self.warps), self.block, self.epoch)

    def scatter(self, values: np.ndarray) -> np.ndarray:
        """One value per thread from those of the active threads."""
        if self.mask is None:
            return values
        out = np.zeros(self.threads, values.dtype)
        out[self.mask] = values
        return out


def builds(*names: str) -> Callable[[Builder], Builder]:
    """Register the builder of instructions whose name begins like this (up to the first dot, or longer)."""

    def register(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(names, builder))
        return builder

    return register


def parts(instruction: Instruction) -> list[str]:
    """The name of an operation, split at its dots."""
    return instruction.name.split(".")


def source(operand: Any, kind: str) -> Callable[[Machine], np.ndarray]:
    """Reader of an operand as an array over the threads (or of one element) of a numpy type."""
    wanted = np.dtype(kind)
    if isinstance(operand, Immediate):
        constant = _constant(operand, wanted)
        return lambda _: constant
    if isinstance(operand, Symbol):
        return _symbol(operand.name, wanted)
    if not isinstance(operand, Register):
        raise Unknown(f"operand {operand}")
    name, bits = operand.name, operand.bits
    if bits == 1 or wanted.itemsize * 8 == bits:
        return lambda machine: machine.registers[name].view(wanted)
    if wanted.itemsize * 8 > bits:
        raise Unknown(f"{kind} from {bits} bits")
    return lambda machine: machine.registers[name].astype(f"u{wanted.itemsize}").view(wanted)


def _constant(operand: Immediate, wanted: np.dtype) -> np.ndarray:
    if wanted == np.bool_:
        return np.array([operand.value != 0])
    bits = wanted.itemsize * 8
    return np.array([operand.value & ((1 << bits) - 1)], f"u{wanted.itemsize}").view(wanted)


def _symbol(name: str, wanted: np.dtype) -> Callable[[Machine], np.ndarray]:
    axis = {"x": 0, "y": 1, "z": 2}.get(name[-1])
    if name == "%tid.x":
        return lambda machine: machine.lanes.astype(wanted)
    if name in ("%tid.y", "%tid.z"):
        return lambda machine: np.zeros(1, wanted)
    if name.startswith("%ctaid"):
        return lambda machine: np.array([machine.block_index[axis]], wanted)
    if name.startswith("%nctaid"):
        return lambda machine: np.array([machine.grid[axis]], wanted)
    if name == "%laneid":
        return lambda machine: (machine.lanes % 32).astype(wanted)
    if name == "global_smem":
        return lambda _: np.array([SHARED], wanted)
    if "_param_" in name:
        number = int(name.rsplit("_", 1)[1])
        return lambda _: np.array([PARAMETER * number], wanted)
    raise Unknown(f"symbol {name}")


def location(operand: Address, kind: str) -> Callable[[Machine], np.ndarray]:
    """Reader of an address; `kind` u4 in shared memory, u8 in global memory."""
    base, offset = source(operand.base, kind), np.array([operand.offset & 0xFFFFFFFF], kind)
    if operand.offset < 0:
        offset = np.array([operand.offset], f"i{offset.dtype.itemsize}").view(kind)
    return lambda machine: base(machine) + offset


def _guarded(step: Step, guard: Register, negated: bool) -> Step:
    name = guard.name

    def run(machine: Machine) -> int | None:
        mask = machine.registers[name]
        mask = ~mask if negated else mask
        if machine.active is not None:
            mask = mask & machine.active
        elif mask.all():
            return step(machine)
        if not mask.any():
            return None
        machine.mask = mask
        result = step(machine)
        machine.mask = machine.active
        return result

    return run


def build(kernel: Kernel) -> list[Step]:
    """One step for each instruction."""
    from ptx import asynchronous, scalar, tiles  # noqa: F401 - they register their builders

    steps = []
    for instruction in kernel.code:
        builder = _builder(instruction.name)
        step = builder(instruction, kernel)
        if instruction.guard is not None and builder is not branch:
            step = _guarded(step, instruction.guard, instruction.negated)
        steps.append(step)
    return steps


def _builder(name: str) -> Builder:
    pieces = name.split(".")
    for length in range(len(pieces), 0, -1):
        found = BUILDERS.get(".".join(pieces[:length]))
        if found is not None:
            return found
    raise Unknown(f"instruction {name}")


@builds("bra")
def branch(instruction: Instruction, kernel: Kernel) -> Step:
    """The threads of a block may diverge."""
    index = next(number for number, item in enumerate(kernel.code) if item is instruction)
    target = kernel.labels[instruction.operands[0].name]
    if instruction.guard is None:
        return lambda _: target
    guard, negated = instruction.guard.name, instruction.negated

    def run(machine: Machine) -> int | None:
        taken = machine.registers[guard] != negated
        acting = machine.acting(taken)
        if acting.all():
            return target
        if acting.any():
            machine.part(taken, index, target)
        return None

    return run


@builds("ret", "exit")
def end(instruction: Instruction, kernel: Kernel) -> Step:
    """The threads are done. What they have not waited for is lost, as on a GPU."""
    return lambda _: -1


@functools.lru_cache(maxsize=256)
def prepared(text: str) -> tuple[Kernel, list[Step]]:
    """A kernel and its steps, cached by its text."""
    kernel = parse(text)
    return kernel, build(kernel)
