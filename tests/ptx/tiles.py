"""Matrix products of one or four warps, and the loads and stores of 8x8 tiles from and to shared memory.

Which elements a lane has: "PTX ISA", matrix fragments of mma and wgmma. Products are summed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.asynchronous import swizzled
from ptx.machine import Machine, Step, Unknown, builds, location, parts, source
from ptx.memory import Moment
from ptx.parse import Instruction, Kernel, Register
from ptx.scalar import widener

_LANE = np.arange(32)
_GROUP, _WITHIN = _LANE // 4, _LANE % 4


def _per_warp(machine: Machine, values: np.ndarray) -> np.ndarray:
    return np.broadcast_to(values, (machine.threads,)).reshape(-1, 32)


def _tf32(bits: np.ndarray) -> np.ndarray:
    return (bits & np.uint32(0xFFFFE000)).view("f4")


def _left(words: list[np.ndarray], kind: str) -> np.ndarray:
    """A [warps, 16, 16 (halves) or 8 (tf32)] in fp32 from four registers [warps, 32]."""
    pair = kind != "tf32"
    out = np.empty((len(words[0]), 16, 16 if pair else 8), np.float32)
    for index, word in enumerate(words):
        row, column = _GROUP + index % 2 * 8, _WITHIN
        if pair:
            halves = widener(kind)(np.ascontiguousarray(word).view("u2").reshape(*word.shape, 2))
            for half in range(2):
                out[:, row, 2 * column + index // 2 * 8 + half] = halves[..., half]
        else:
            out[:, row, column + index // 2 * 4] = _tf32(word)
    return out


def _right(words: list[np.ndarray], kind: str) -> np.ndarray:
    """B [warps, 16 or 8, 8] in fp32 from two registers [warps, 32]."""
    pair = kind != "tf32"
    out = np.empty((len(words[0]), 16 if pair else 8, 8), np.float32)
    for index, word in enumerate(words):
        if pair:
            halves = widener(kind)(np.ascontiguousarray(word).view("u2").reshape(*word.shape, 2))
            for half in range(2):
                out[:, 2 * _WITHIN + index * 8 + half, _GROUP] = halves[..., half]
        else:
            out[:, _WITHIN + index * 4, _GROUP] = _tf32(word)
    return out


def _unpack(words: list[np.ndarray]) -> np.ndarray:
    """The result [warps, 16, 8 * blocks] from its registers [warps, 32] each, four for every eight columns."""
    out = np.empty((len(words[0]), 16, 2 * len(words)), np.float32)
    for index, word in enumerate(words):
        block, part = divmod(index, 4)
        out[:, _GROUP + part // 2 * 8, 8 * block + 2 * _WITHIN + part % 2] = word
    return out


def _pack(tile: np.ndarray, index: int) -> np.ndarray:
    """Register `index` of a result, [threads]."""
    block, part = divmod(index, 4)
    return np.ascontiguousarray(tile[:, _GROUP + part // 2 * 8, 8 * block + 2 * _WITHIN + part % 2]).reshape(-1)


@builds("mma.sync")
def product(instruction: Instruction, kernel: Kernel) -> Step:
    """D = A B + C of a warp: m16n8k16 in halves, m16n8k8 in tf32."""
    shape, kind = parts(instruction)[3], parts(instruction)[7]
    if (shape, kind) not in (("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32")):
        raise Unknown(instruction.text)
    target, *operands = instruction.operands
    left, right = ([source(one, "u4") for one in operand] for operand in operands[:2])
    added = [source(one, "f4") for one in operands[2]]

    def run(machine: Machine) -> None:
        machine.whole(instruction)
        words = lambda readers: [_per_warp(machine, read(machine)) for read in readers]  # noqa: E731
        with np.errstate(all="ignore"):
            tile = _left(words(left), kind) @ _right(words(right), kind) + _unpack(words(added))
        for index, one in enumerate(target):
            machine.write(one, _pack(tile, index))

    return run


def _rows(machine: Machine, addresses: np.ndarray, count: int) -> np.ndarray:
    """Addresses [warps, count, 8] of the rows of `count` 8x8 tiles: lane 8 i + r has row r of tile i."""
    return _per_warp(machine, addresses)[:, : 8 * count].reshape(-1, count, 8)


def _warps(machine: Machine, count: int) -> Moment:
    warps = np.repeat(machine.warps[::32], count)
    return Moment(warps, machine.block, machine.epoch)


@builds("ldmatrix.sync")
def load_tiles(instruction: Instruction, kernel: Kernel) -> Step:
    """8x8 halves: lane l gets (row l / 4, columns 2 (l % 4) and the next), of the transpose with `trans`."""
    targets, address = instruction.operands
    where, transposed, count = location(address, "u4"), "trans" in instruction.name, len(targets)

    def run(machine: Machine) -> None:
        machine.whole(instruction)
        rows = _rows(machine, where(machine), count)
        tiles = machine.shared.load(rows.reshape(-1), 4, 4, _warps(machine, 8 * count))
        tiles = tiles.view("u2").reshape(*rows.shape, 8)
        for index, target in enumerate(targets):
            tile = tiles[:, index].swapaxes(1, 2) if transposed else tiles[:, index]
            pairs = np.ascontiguousarray(tile).view("u4")  # [warps, 8, 4]
            machine.write(target, np.ascontiguousarray(pairs[:, _GROUP, _WITHIN]).reshape(-1))

    return run


@builds("stmatrix.sync")
def store_tiles(instruction: Instruction, kernel: Kernel) -> Step:
    """The inverse of `ldmatrix`."""
    address, values = instruction.operands
    where, transposed, count = location(address, "u4"), "trans" in instruction.name, len(values)
    readers = [source(value, "u4") for value in values]

    def run(machine: Machine) -> None:
        machine.whole(instruction)
        rows = _rows(machine, where(machine), count)
        tiles = np.empty((*rows.shape, 8), "u2")
        for index, read in enumerate(readers):
            pairs = np.empty((len(rows), 8, 4), "u4")
            pairs[:, _GROUP, _WITHIN] = _per_warp(machine, read(machine))
            tile = pairs.view("u2")
            tiles[:, index] = tile.swapaxes(1, 2) if transposed else tile
        machine.shared.store(rows.reshape(-1), tiles.reshape(-1, 8).view("u4"), _warps(machine, 8 * count))

    return run


@builds("wgmma.fence", "wgmma.commit_group", "wgmma.wait_group")
def in_order(instruction: Instruction, kernel: Kernel) -> Step:
    """Nothing to do: here products of four warps are synchronous."""
    return lambda _: None


def _described(machine: Machine, descriptor: int, rows: int, depth: int, size: int, transposed: bool) -> np.ndarray:
    """Elements [rows, depth] of `size` bytes that a matrix descriptor describes. Rows are contiguous, or (transposed)
    columns are.
    """
    begin, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode = {0: 0, 1: 3, 2: 2, 3: 1}[descriptor >> 62 & 3]
    row, deep = np.arange(rows)[:, None], np.arange(depth)[None]
    line = 16 << mode  # bytes side by side
    if transposed:
        row, deep = deep.T, row.T
        per_line = line // size
        lines = (np.arange(rows) // per_line * leading + np.arange(rows) % per_line * size)[:, None]
        offsets = lines + (np.arange(depth) // 8 * stride + np.arange(depth) % 8 * line)[None]
    elif mode:
        offsets = row // 8 * stride + row % 8 * line + deep * size
    else:
        offsets = row // 8 * stride + row % 8 * 16 + deep * size // 16 * leading + deep * size % 16
    offsets = swizzled(begin + offsets, mode).astype("u4")
    moment = Moment(np.full(offsets.size, machine.warps[0]), machine.block, machine.epoch)
    return machine.shared.gather(offsets.ravel(), size, moment).reshape(offsets.shape)


def _decoder(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    return _tf32 if kind == "tf32" else widener(kind)


@builds("wgmma.mma_async")
def group_product(instruction: Instruction, kernel: Kernel) -> Step:
    """D = A B (+ D) of four warps: A [64, k] from registers or shared memory, B [k, n] from shared memory."""
    shape, kind = parts(instruction)[4], parts(instruction)[-1]
    columns, depth = (int(number) for number in shape.removeprefix("m64n").split("k"))
    target, left, right, keep, *signs = instruction.operands
    transposes = [sign.value for sign in signs[2:]]
    if any(sign.value != 1 for sign in signs[:2]) or kernel.threads % 128:
        raise Unknown(instruction.text)
    size, decode = 4 if kind == "tf32" else 2, _decoder(kind)
    from_registers = isinstance(left, tuple)
    transpose_left, transpose_right = (0, *transposes)[-2:] if transposes else (0, 0)
    readers = [source(one, "u4") for one in left] if from_registers else source(left, "u8")
    described, kept = source(right, "u8"), source(keep, "?")
    sums = [source(one, "f4") for one in target if isinstance(one, Register)]

    def run(machine: Machine) -> None:
        machine.whole(instruction)
        keeps = kept(machine)
        groups = machine.threads // 128
        before = _unpack([_per_warp(machine, read(machine)) for read in sums])  # [warps, 16, n]
        before = before.reshape(groups, 64, columns)
        if from_registers:
            words = [_per_warp(machine, read(machine)) for read in readers]
            a = _left(words, kind).reshape(groups, 64, depth)
        else:
            firsts = np.broadcast_to(readers(machine), (machine.threads,))[::128]
            a = np.stack([decode(_described(machine, int(d), 64, depth, size, bool(transpose_left))) for d in firsts])
        firsts = np.broadcast_to(described(machine), (machine.threads,))[::128]
        b = np.stack([decode(_described(machine, int(d), columns, depth, size, bool(transpose_right))) for d in firsts])
        with np.errstate(all="ignore"):
            tile = a @ b.swapaxes(1, 2) + (before if keeps.all() else 0)
        if keeps.any() and not keeps.all():
            raise Unknown(f"threads disagree: {instruction.text}")
        tile = tile.reshape(-1, 16, columns)
        for index, one in enumerate(target):
            machine.write(one, _pack(tile, index))

    return run
