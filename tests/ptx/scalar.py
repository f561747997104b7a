"""Instructions on each thread's own registers, loads and stores, exchanges within a warp."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.machine import PARAMETER, TYPES, Machine, Step, Unknown, builds, location, parts, source
from ptx.parse import Instruction, Kernel, Register

_TINY = np.float32(2.0**-126)


def _flush(value: np.ndarray) -> np.ndarray:
    return np.where(np.abs(value) < _TINY, np.copysign(np.float32(0), value), value)


def _apply(instruction: Instruction, kinds: list[str], compute: Callable[..., np.ndarray]) -> Step:
    """A step that computes the first operand from the others, of the given types."""
    target = instruction.operands[0]
    readers = [source(operand, kind) for operand, kind in zip(instruction.operands[1:], kinds, strict=True)]
    flushed = "ftz" in parts(instruction)

    def run(machine: Machine) -> None:
        values = [reader(machine) for reader in readers]
        with np.errstate(all="ignore"):
            if flushed:
                values = [_flush(value) if value.dtype == np.float32 else value for value in values]
            result = compute(*values)
            if flushed and result.dtype == np.float32:
                result = _flush(result)
        machine.write(target, result)

    return run


def _shaped(instruction: Instruction, compute: Callable[..., np.ndarray], count: int) -> Step:
    kind = parts(instruction)[-1]
    if kind in ("bf16", "f16", "bf16x2", "f16x2"):
        return _half(instruction, compute, count, kind)
    return _apply(instruction, [TYPES[kind]] * count, compute)


def _half(instruction: Instruction, compute: Callable[..., np.ndarray], count: int, kind: str) -> Step:
    """In fp32, rounded once; `x2` on both halves; `add.rn.f32.bf16` has a half operand first and an fp32 result."""
    if "f32" in parts(instruction):
        widen = widener(kind)
        kinds = ["u2", *["f4"] * (count - 1)]
        return _apply(instruction, kinds, lambda first, *rest: compute(widen(first), *rest))
    widen, narrow = widener(kind.removesuffix("x2")), narrower(kind.removesuffix("x2"))

    def on_words(*values: np.ndarray) -> np.ndarray:
        return narrow(compute(*[widen(value) for value in values]))

    def on_pairs(*values: np.ndarray) -> np.ndarray:
        values = np.broadcast_arrays(*values)
        halves = [np.ascontiguousarray(value).view("u2").reshape(-1, 2) for value in values]
        low, high = (on_words(*[half[:, side] for half in halves]) for side in (0, 1))
        return low.astype("u4") | high.astype("u4") << np.uint32(16)

    return _apply(instruction, [TYPES[kind]] * count, on_pairs if kind.endswith("x2") else on_words)


def widener(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    """16-bit patterns to fp32."""
    if kind == "bf16":
        return lambda bits: (bits.astype("u4") << np.uint32(16)).view("f4")
    return lambda bits: bits.view("f2").astype("f4")


def narrower(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    """fp32 to 16-bit patterns, to the nearest, ties to even."""
    if kind == "f16":
        return lambda value: value.astype("f2").view("u2")

    def to_bf16(value: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(value, np.float32).view("u4")
        rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(value), 0x7FFF, rounded).astype("u2")

    return to_bf16


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c rounded once, by way of fp64."""
    return (a.astype("f8") * b.astype("f8") + c.astype("f8")).astype(a.dtype)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of integers, rounded towards zero."""
    a, b = np.broadcast_arrays(a, b)
    quotient = np.abs(a) // np.where(b == 0, 1, np.abs(b))
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype) if a.dtype.kind == "i" else quotient


@builds("add", "sub", "min", "max", "and", "or", "xor")
def binary(instruction: Instruction, kernel: Kernel) -> Step:
    """Two operands of one type. Minimum and maximum of a NaN and a number are the number."""
    name, kind = parts(instruction)[0], parts(instruction)[-1]
    floating = kind[0] == "f" or kind.startswith("bf")
    compute = {
        "add": np.add, "sub": np.subtract, "min": np.fmin if floating else np.minimum,
        "max": np.fmax if floating else np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }[name]  # fmt: skip
    return _shaped(instruction, compute, 2)


@builds("mul")
def multiply(instruction: Instruction, kernel: Kernel) -> Step:
    """Low half, high half or (wide) all of a product; or a product of floats."""
    pieces = parts(instruction)
    kind = TYPES[pieces[-1]]
    if "wide" in pieces:
        wide = f"{kind[0]}{2 * int(kind[1])}"
        return _apply(instruction, [kind, kind], lambda a, b: a.astype(wide) * b.astype(wide))
    if "hi" in pieces:
        if kind[1] != "4":
            raise Unknown(instruction.text)
        return _apply(instruction, [kind, kind], lambda a, b: (a.astype(f"{kind[0]}8") * b >> 32).astype(kind))
    return _shaped(instruction, np.multiply, 2)


@builds("mad")
def multiply_add(instruction: Instruction, kernel: Kernel) -> Step:
    """Integers."""
    pieces = parts(instruction)
    kind = TYPES[pieces[-1]]
    wide = f"{kind[0]}{2 * int(kind[1])}" if "wide" in pieces else kind
    return _apply(instruction, [kind, kind, wide], lambda a, b, c: a.astype(wide) * b.astype(wide) + c)


@builds("fma")
def fused(instruction: Instruction, kernel: Kernel) -> Step:
    """a b + c in floats."""
    return _shaped(instruction, _fused, 3)


@builds("div", "rem")
def divide(instruction: Instruction, kernel: Kernel) -> Step:
    """Floats (every approximation as the exact quotient) and integers, rounded towards zero."""
    kind = TYPES[parts(instruction)[-1]]
    if kind[0] == "f":
        return _apply(instruction, [kind, kind], np.divide)
    if parts(instruction)[0] == "rem":
        return _apply(instruction, [kind, kind], lambda a, b: a - _quotient(a, b) * b)
    return _apply(instruction, [kind, kind], _quotient)


@builds("neg", "abs", "not", "ex2", "lg2", "sqrt", "rsqrt", "rcp", "sin", "cos", "tanh")
def unary(instruction: Instruction, kernel: Kernel) -> Step:
    """One operand; approximations are computed exactly."""
    one = np.float32(1)
    compute = {
        "neg": np.negative, "abs": np.abs, "not": np.invert, "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt,
        "rsqrt": lambda x: one / np.sqrt(x), "rcp": lambda x: one / x, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    }[parts(instruction)[0]]  # fmt: skip
    return _shaped(instruction, compute, 1)


@builds("shl", "shr")
def shift(instruction: Instruction, kernel: Kernel) -> Step:
    """Distances beyond the width shift everything out."""
    name, kind = parts(instruction)[0], TYPES[parts(instruction)[-1]]
    bits = int(kind[1]) * 8

    def compute(value: np.ndarray, distance: np.ndarray) -> np.ndarray:
        beyond, near = distance >= bits, np.minimum(distance, bits - 1).astype(kind)
        if name == "shl":
            return np.where(beyond, np.zeros(1, kind), value << near)
        rest = value >> np.array([bits - 1], kind) if kind[0] == "i" else 0
        return np.where(beyond, rest, value >> near).astype(kind)

    return _apply(instruction, [kind, "u4"], compute)


@builds("bfe")
def extract(instruction: Instruction, kernel: Kernel) -> Step:
    """`length` bits from `begin` on, sign-extended for signed types."""
    kind = TYPES[parts(instruction)[-1]]
    bits = int(kind[1]) * 8

    def compute(value: np.ndarray, begin: np.ndarray, length: np.ndarray) -> np.ndarray:
        if (begin + length > bits).any() or (length < 1).any():
            raise Unknown(f"bits beyond the word: {instruction.text}")
        left = (bits - begin - length).astype(kind)
        return value << left >> (bits - length).astype(kind)

    return _apply(instruction, [kind, "u4", "u4"], compute)


@builds("prmt")
def permute(instruction: Instruction, kernel: Kernel) -> Step:
    """Each byte of the result is one of the eight of two words."""

    def compute(a: np.ndarray, b: np.ndarray, choice: np.ndarray) -> np.ndarray:
        a, b, choice = np.broadcast_arrays(a, b, choice)
        both = a.astype("u8") | b.astype("u8") << np.uint64(32)
        out = np.zeros(len(both), "u4")
        for index in range(4):
            selector = choice >> np.uint32(4 * index) & np.uint32(0xF)
            byte = (both >> (np.uint64(8) * (selector & 7).astype("u8")) & np.uint64(0xFF)).astype("u4")
            sign = np.where(byte & 0x80, 0xFF, 0).astype("u4")
            out |= np.where(selector & 8, sign, byte) << np.uint32(8 * index)
        return out

    return _apply(instruction, ["u4", "u4", "u4"], compute)


@builds("selp")
def select(instruction: Instruction, kernel: Kernel) -> Step:
    """The first operand where the predicate holds, else the second."""
    kind = TYPES[parts(instruction)[-1]]
    return _apply(instruction, [kind, kind, "?"], lambda a, b, chosen: np.where(chosen, a, b))


@builds("setp")
def compare(instruction: Instruction, kernel: Kernel) -> Step:
    """A comparison; with a NaN only those whose name ends in u are true."""
    pieces = parts(instruction)
    name, kind = pieces[1], TYPES[pieces[-1]]
    if len(pieces) != 3 and pieces[2] != "ftz":
        raise Unknown(instruction.text)
    if name in ("num", "nan"):
        return _apply(instruction, [kind] * 2, lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan"))
    relation = {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
        "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    }  # fmt: skip
    if kind[0] != "f":
        return _apply(instruction, [kind] * 2, relation[name])
    unordered = name.endswith("u")
    holds = relation[name.removesuffix("u")]

    def compute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        missing = np.isnan(a) | np.isnan(b)
        return holds(a, b) | missing if unordered else holds(a, b) & ~missing

    return _apply(instruction, [kind] * 2, compute)


@builds("cvt")
def convert(instruction: Instruction, kernel: Kernel) -> Step:
    """Between types; a pair of halves is made of two floats, the second becoming the low half."""
    *modes, to, of = parts(instruction)[1:]
    if to.endswith("x2"):
        narrow = narrower(to.removesuffix("x2"))
        pack = lambda high, low: narrow(low).astype("u4") | narrow(high).astype("u4") << np.uint32(16)  # noqa: E731
        return _apply(instruction, ["f4", "f4"], pack)
    if to == "tf32":
        return _apply(instruction, ["f4"], lambda x: (x.view("u4") + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
    if to in ("bf16", "f16") and of == "f32":
        return _apply(instruction, ["f4"], narrower(to))
    if of in ("bf16", "f16") and to == "f32":
        return _apply(instruction, ["u2"], widener(of))
    rounding = {"rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc, "rni": np.rint}
    chosen = next((rounding[mode] for mode in modes if mode in rounding), lambda x: x)
    return _apply(instruction, [TYPES[of]], lambda x: chosen(x).astype(TYPES[to]))


@builds("mov", "cvta")
def move(instruction: Instruction, kernel: Kernel) -> Step:
    """Copies a register, or joins or splits a tuple of narrower ones (the first is the lowest)."""
    target, value = instruction.operands
    kind = TYPES[parts(instruction)[-1]]
    if isinstance(target, tuple):
        read, part = source(value, kind), f"u{int(kind[1]) // len(target)}"

        def separate(machine: Machine) -> None:
            pieces = np.ascontiguousarray(np.broadcast_to(read(machine), (machine.threads,))).view(part)
            for index, one in enumerate(target):
                machine.write(one, np.ascontiguousarray(pieces.reshape(machine.threads, -1)[:, index]))

        return separate
    if isinstance(value, tuple):
        readers = [source(one, f"u{int(kind[1]) // len(value)}") for one in value]

        def join(machine: Machine) -> None:
            pieces = [np.broadcast_to(read(machine), (machine.threads,)) for read in readers]
            machine.write(target, np.stack(pieces, 1).view(kind)[:, 0])

        return join
    return _apply(instruction, [kind], lambda x: x)


def _vector(operand: object) -> tuple:
    return operand if isinstance(operand, tuple) else (operand,)


@builds("ld.param")
def load_parameter(instruction: Instruction, kernel: Kernel) -> Step:
    """An argument of the kernel; which one may depend on a register that is the same in all threads."""
    target, address = instruction.operands
    kind = f"u{TYPES[parts(instruction)[-1]][1]}"
    mask, signed = (1 << int(kind[1]) * 8) - 1, parts(instruction)[-1].startswith("s")
    bits = address.base.bits if isinstance(address.base, Register) else 32
    where = location(address, f"u{bits // 8}")

    def run(machine: Machine) -> None:
        addresses = where(machine)
        number, offset = divmod(int(addresses[0]), PARAMETER)
        if offset or (addresses != addresses[0]).any():
            raise Unknown(instruction.text)
        word = np.array([machine.arguments[number] & mask], kind)
        machine.write(target, _widened(word, target.bits, signed))

    return run


def _widened(words: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """Extended to a register of that many bits."""
    size = words.dtype.itemsize
    return words.view(f"{'i' if signed else 'u'}{size}").astype(f"{'i' if signed else 'u'}{bits // 8}")


@builds("ld.global", "ld.shared")
def load(instruction: Instruction, kernel: Kernel) -> Step:
    """One word or two or four consecutive ones per thread."""
    targets, address = _vector(instruction.operands[0]), instruction.operands[1]
    word, signed = int(TYPES[parts(instruction)[-1]][1]), parts(instruction)[-1].startswith("s")
    shared = parts(instruction)[1] == "shared"
    where = location(address, "u4" if shared else "u8")

    def run(machine: Machine) -> None:
        space = machine.shared if shared else machine.memory
        words = space.load(machine.acting(where(machine)), word, len(targets), machine.moment())
        for index, target in enumerate(targets):
            value = machine.scatter(np.ascontiguousarray(words[:, index]))
            machine.write(target, _widened(value, target.bits, signed))

    return run


@builds("st.global", "st.shared")
def store(instruction: Instruction, kernel: Kernel) -> Step:
    """One word or two or four consecutive ones per thread."""
    address, values = instruction.operands[0], _vector(instruction.operands[1])
    shared = parts(instruction)[1] == "shared"
    where = location(address, "u4" if shared else "u8")
    readers = [source(value, f"u{TYPES[parts(instruction)[-1]][1]}") for value in values]

    def run(machine: Machine) -> None:
        words = np.stack([machine.acting(read(machine)) for read in readers], 1)
        space = machine.shared if shared else machine.memory
        space.store(machine.acting(where(machine)), words, machine.moment())

    return run


def _whole_warps(instruction: Instruction, members: object) -> None:
    if getattr(members, "value", None) not in (-1, 0xFFFFFFFF):
        raise Unknown(f"some lanes of a warp only: {instruction.text}")


@builds("shfl.sync")
def shuffle(instruction: Instruction, kernel: Kernel) -> Step:
    """Registers of another lane of the warp."""
    target, value, lane, clamp, members = instruction.operands
    _whole_warps(instruction, members)
    if getattr(clamp, "value", None) != 31:
        raise Unknown(instruction.text)
    target = target[0] if isinstance(target, tuple) else target
    read, other, mode = source(value, "u4"), source(lane, "u4"), parts(instruction)[2]

    def run(machine: Machine) -> None:
        machine.whole(instruction)
        own = machine.lanes % 32
        distance = other(machine).astype("i8")
        from_lane = {"bfly": own ^ distance, "idx": distance & 31, "down": own + distance, "up": own - distance}[mode]
        from_lane = np.where((from_lane < 0) | (from_lane > 31), own, from_lane)
        values = np.broadcast_to(read(machine), (machine.threads,))
        machine.write(target, values[machine.lanes // 32 * 32 + from_lane])

    return run


@builds("redux.sync")
def reduce(instruction: Instruction, kernel: Kernel) -> Step:
    """Sum, minimum or maximum over a warp."""
    target, value, members = instruction.operands
    _whole_warps(instruction, members)
    read = source(value, TYPES[parts(instruction)[-1]])
    compute = {"add": np.add, "min": np.fmin, "max": np.fmax}[parts(instruction)[2]]

    def run(machine: Machine) -> None:
        machine.whole(instruction)
        values = np.broadcast_to(read(machine), (machine.threads,)).reshape(-1, 32)
        machine.write(target, np.repeat(compute.reduce(values, 1, dtype=values.dtype), 32))

    return run


@builds("elect.sync")
def elect(instruction: Instruction, kernel: Kernel) -> Step:
    """One lane of each warp: the first."""
    (lane, chosen), _ = instruction.operands

    def run(machine: Machine) -> None:
        machine.write(lane, np.zeros(1, "u4"))
        machine.write(chosen, machine.lanes % 32 == 0)

    return run
