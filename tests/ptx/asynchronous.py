"""Barriers, and asynchronous copies: of a thread's own words, and of tiles of a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptx.machine import PARAMETER, Machine, Step, Unknown, builds, location, parts, source
from ptx.memory import Moment
from ptx.parse import Immediate, Instruction, Kernel


@dataclass(frozen=True)
class Tensor2d:
    """A matrix as a tensor copy sees it: address, rows x columns, bytes from row to row and of an element, the box of a
    copy [rows, columns], and log2(bytes / 16) of the swizzle (0: none).
    """

    address: int
    shape: tuple[int, int]
    stride: int
    element: int
    box: tuple[int, int]
    swizzle: int


def swizzled(addresses: np.ndarray, mode: int) -> np.ndarray:
    """Addresses in shared memory with the 16-byte column of a line permuted by the line's number.

    mode 1, 2, 3: lines of 32, 64, 128 bytes ("PTX ISA", swizzle modes of tensor copies and of wgmma's descriptors).
    """
    return addresses ^ ((addresses >> 7 & (1 << mode) - 1) << 4)


@builds("bar.sync", "barrier.sync")
def barrier(instruction: Instruction, kernel: Kernel) -> Step:
    """All threads of the block: what was written before is visible to all."""
    operands = instruction.operands
    if len(operands) > 1 and getattr(operands[1], "value", None) != kernel.threads:
        raise Unknown(f"a barrier of some threads only: {instruction.text}")

    def run(machine: Machine) -> None:
        machine.whole(instruction)
        machine.epoch += 1

    return run


@builds("bar.warp.sync", "fence", "membar")
def order(instruction: Instruction, kernel: Kernel) -> Step:
    """Nothing to do: here the threads of a warp run in lockstep, and memory is in order."""
    return lambda _: None


@builds("cp.async.ca", "cp.async.cg")
def copy(instruction: Instruction, kernel: Kernel) -> Step:
    """Global to shared; bytes beyond the source size are zeros. The data arrive when the group is waited for; until
    then nobody may read or overwrite the target.
    """
    to, of, size, *rest = instruction.operands
    assert isinstance(size, Immediate)
    wide = size.value
    to_address, of_address = location(to, "u4"), location(of, "u8")
    given = source(rest[0], "u4") if rest else None

    def run(machine: Machine) -> None:
        targets, sources = machine.acting(to_address(machine)), machine.acting(of_address(machine))
        sizes = machine.acting(given(machine)) if given else np.full(len(targets), wide)
        if not np.isin(sizes, (0, wide)).all():
            raise Unknown(f"part of a copy: {instruction.text}")
        machine.shared.claim(targets, wide, machine.moment())
        machine.copies.append((targets, sources, sizes > 0, wide, machine.acting(machine.warps)))

    return run


@builds("cp.async.commit_group")
def commit(instruction: Instruction, kernel: Kernel) -> Step:
    """The copies so far are a group."""

    def run(machine: Machine) -> None:
        machine.groups.append(machine.copies)
        machine.copies = []

    return run


@builds("cp.async.wait_group", "cp.async.wait_all")
def wait(instruction: Instruction, kernel: Kernel) -> Step:
    """Until at most so many groups are pending."""
    left = instruction.operands[0].value if instruction.operands else 0

    def run(machine: Machine) -> None:
        while len(machine.groups) > left:
            for targets, sources, present, wide, warps in machine.groups.pop(0):
                words = np.zeros((len(targets), wide // 4), "u4")
                moment = Moment(warps[present], machine.block, machine.epoch)
                if present.any():
                    words[present] = machine.memory.load(sources[present], 4, wide // 4, moment)
                machine.shared.store(targets, words, Moment(warps, machine.block, machine.epoch))

    return run


@dataclass
class _Barrier:
    """An mbarrier: the arrivals it needs, arrivals and bytes still missing in this phase, and completed phases."""

    needed: int
    missing: int
    bytes: int = 0
    phase: int = 0

    def settle(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.needed


def _one(values: np.ndarray, instruction: Instruction) -> int:
    if (values != values[0]).any():
        raise Unknown(f"several addresses: {instruction.text}")
    return int(values[0])


@builds("mbarrier")
def message_barrier(instruction: Instruction, kernel: Kernel) -> Step:
    """Initialised, told how many bytes to expect, tested for the end of a phase; by one thread, or tested by all."""
    action = parts(instruction)[1]
    operands = instruction.operands
    where = location(operands[0] if action in ("init", "inval") else operands[1], "u4")
    number = source(operands[-1], "u4") if action != "inval" else None

    def run(machine: Machine) -> None:
        at = _one(machine.acting(where(machine)), instruction)
        if action == "init":
            count = _one(machine.acting(number(machine)), instruction)
            machine.barriers[at] = _Barrier(count, count)
        elif action == "inval":
            del machine.barriers[at]
        elif action == "arrive":
            state = machine.barriers[at]
            state.missing -= len(machine.acting(machine.lanes))
            state.bytes += _one(machine.acting(number(machine)), instruction) if "expect_tx" in instruction.name else 0
            state.settle()
        elif action == "try_wait" and "parity" in instruction.name:
            parity = _one(machine.acting(number(machine)), instruction)
            done = machine.barriers[at].phase % 2 != parity
            machine.write(operands[0], np.array([done]))
        else:
            raise Unknown(instruction.text)

    return run


@builds("cp.async.bulk.tensor.2d")
def tensor_copy(instruction: Instruction, kernel: Kernel) -> Step:
    """A box of a matrix to shared memory, zeros outside the matrix; its bytes are counted by an mbarrier."""
    to, of, signal = instruction.operands
    target, barrier_at, handle = location(to, "u4"), location(signal, "u4"), source(of.base, "u8")
    column, row = (source(coordinate, "i4") for coordinate in of.coordinates)

    def run(machine: Machine) -> None:
        read = lambda reader: _one(machine.acting(reader(machine)), instruction)  # noqa: E731
        tensor: Tensor2d = machine.arguments[read(handle) // PARAMETER]
        if read(target) % (128 << (tensor.swizzle > 0) * 3):
            raise Unknown(f"a tile at {read(target)}, which its swizzle does not allow")
        rows, columns = read(row) + np.arange(tensor.box[0]), read(column) + np.arange(tensor.box[1])
        inside = np.logical_and.outer(_within(rows, tensor.shape[0]), _within(columns, tensor.shape[1]))
        sources = tensor.address + np.add.outer(rows * tensor.stride, columns * tensor.element)
        words = np.zeros(inside.shape, f"u{tensor.element}")
        warps = np.full(int(inside.sum()), machine.acting(machine.warps)[0])
        words[inside] = machine.memory.load(
            sources[inside].astype("u8"), tensor.element, 1, Moment(warps, machine.block, machine.epoch)
        )[:, 0]
        line = tensor.box[1] * tensor.element
        targets = read(target) + np.arange(tensor.box[0])[:, None] * line + np.arange(tensor.box[1]) * tensor.element
        targets = swizzled(targets, tensor.swizzle).ravel().astype("u4")
        # another proxy writes, ordered by the mbarrier that readers wait for, so no record of the writer is kept
        machine.shared.store(targets, words.reshape(-1, 1), Moment(np.zeros(len(targets), int), machine.block, -1))
        state = machine.barriers[read(barrier_at)]
        state.bytes -= words.nbytes
        state.settle()

    return run


def _within(indices: np.ndarray, size: int) -> np.ndarray:
    return (indices >= 0) & (indices < size)
