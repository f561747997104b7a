"""The text of a PTX kernel as a list of instructions, with labels and registers resolved."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

_WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "u32": 32, "f32": 32, "u64": 64, "s32": 32, "f64": 64}
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)[^,()]*?(\w+)(?:\[(\d+)\])?\s*(?=,|\)|$)", re.DOTALL)


@dataclass(frozen=True)
class Register:
    """A register and its bits (1: a predicate)."""

    name: str
    bits: int


@dataclass(frozen=True)
class Immediate:
    """The bits of a constant; `floating` says how many of them a literal of a float has (0: an integer)."""

    value: int
    floating: int = 0


@dataclass(frozen=True)
class Symbol:
    """A name with an address (of shared memory, of a parameter) or a special register (%tid.x)."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset], or [base, coordinates] of a tensor copy."""

    base: Any
    offset: int = 0
    coordinates: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Instruction:
    """An operation with its modifiers as written, its operands, and its predicate."""

    name: str
    operands: tuple[Any, ...]
    guard: Register | None
    negated: bool
    text: str


@dataclass(eq=False)
class Kernel:
    """A parsed kernel: `labels` are indices into `code`, `parameters` are (name, type) in order."""

    name: str
    threads: int
    parameters: list[tuple[str, str]]
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)


class _Scope:
    """Names declared inside braces hide those outside; labels and registers of each scope get unique names."""

    def __init__(self, depth: int, number: int, outer: _Scope | None) -> None:
        self.tag = f"@{number}" if depth else ""
        self.registers: dict[str, Register] = {}
        self.labels: set[str] = set()
        self.outer = outer


def parse(text: str) -> Kernel:
    """The one kernel of a PTX file. `ValueError` if the file has none that is recognised."""
    text = re.sub(r"//[^\n]*", "", text)
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)\s*((?:\.\w+[^\n{]*\n?)*)\{", text, re.DOTALL)
    if entry is None:
        raise ValueError("no kernel in this PTX")
    threads = re.search(r"\.reqntid\s+(\d+)", entry[3])
    kernel = Kernel(entry[1], int(threads[1]) if threads else 1, [])
    kernel.parameters = [(match[2], match[1]) for match in _PARAMETER.finditer(entry[2])]
    _body(kernel, text[entry.end() :])
    return kernel


def _body(kernel: Kernel, text: str) -> None:
    scope, count, position = _Scope(0, 0, None), 0, 0
    pending: list[tuple[str, _Scope]] = []
    while True:
        position = re.compile(r"\s*").match(text, position).end()
        label = re.compile(r"([\w$]+)\s*:(?!:)").match(text, position)
        if text[position] == "{":
            count += 1
            scope, position = _Scope(1, count, scope), position + 1
        elif text[position] == "}":
            if scope.outer is None:
                break
            scope, position = scope.outer, position + 1
        elif label:
            scope.labels.add(label[1])
            kernel.labels[label[1] + scope.tag] = len(pending)
            position = label.end()
        elif text.startswith((".loc", ".pragma", ".branchtargets"), position):
            position = text.index("\n", position)
        else:
            end = text.index(";", position)
            statement, position = text[position:end].strip(), end + 1
            if statement.startswith(".reg"):
                _declare(kernel, statement, scope)
            elif not statement.startswith("."):
                pending.append((" ".join(statement.split()), scope))
    kernel.code = [_instruction(statement, scope) for statement, scope in pending]


def _declare(kernel: Kernel, statement: str, scope: _Scope) -> None:
    kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.DOTALL).groups()
    for name in names.split(","):
        family = re.fullmatch(r"\s*(%\w+?)<(\d+)>\s*", name)
        listed = [f"{family[1]}{i}" for i in range(int(family[2]))] if family else [name.strip()]
        for one in listed:
            scope.registers[one] = Register(one + scope.tag, _WIDTHS[kind])
            kernel.registers[one + scope.tag] = _WIDTHS[kind]


def _instruction(statement: str, scope: _Scope) -> Instruction:
    guard, negated, rest = None, False, statement
    if statement.startswith("@"):
        mark, rest = statement.split(None, 1)
        negated = mark.startswith("@!")
        guard = _operand(mark.lstrip("@!"), scope)
    name, _, operands = rest.partition(" ")
    return Instruction(name, tuple(_operand(o, scope) for o in _split(operands)), guard, negated, statement)


def _split(text: str) -> list[str]:
    """Operands, at the commas that are in no brackets."""
    parts, depth, begin = [], 0, 0
    for position, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and not depth:
            parts.append(text[begin:position])
            begin = position + 1
    return [part.strip() for part in [*parts, text[begin:]] if part.strip()]


def _operand(text: str, scope: _Scope) -> Any:
    if text.startswith("{"):
        return tuple(_operand(part, scope) for part in _split(text[1:-1]))
    if text.startswith("["):
        parts = _split(text[1:-1])
        base, _, offset = parts[0].partition("+")
        coordinates = _operand(parts[1], scope) if len(parts) > 1 else ()
        return Address(_operand(base.strip(), scope), int(offset or 0), coordinates)
    if "|" in text:
        return tuple(_operand(part.strip(), scope) for part in text.split("|"))
    return None if text == "_" else _literal(text) or _name(text, scope)


def _literal(text: str) -> Immediate | None:
    floating = re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text)
    if floating:
        return Immediate(int(floating[2], 16), 32 if floating[1] in "fF" else 64)
    whole = re.fullmatch(r"(-?)(0x[0-9a-fA-F]+|\d+)U?", text)
    return Immediate(int(whole[1] + whole[2], 0)) if whole else None


def _name(text: str, scope: _Scope) -> Register | Symbol:
    inner: _Scope | None = scope
    while inner is not None:
        if text in inner.registers:
            return inner.registers[text]
        if text in inner.labels:
            return Symbol(text + inner.tag)
        inner = inner.outer
    return Symbol(text)
