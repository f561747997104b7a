"""Compile the shipped kernels without a GPU and report what they need: `python tests/kernels/ahead_of_time.py`.

Each operation runs its own code, forward and backward, on tensors of the meta device inside `record_launches`; every
launch it would have made is compiled with the types it would have passed. A configuration fails if it spills registers
(a stack frame or local memory in the machine code) or needs more shared memory than a block of that GPU may have.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from exlm_dist.kernels.launch import COMMON, Launch, record_launches  # noqa: E402

# Compute capability -> bytes of shared memory a block may ask for (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {(8, 0): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}
OPERATIONS = ("attention", "transitions", "vocab", "dag", "elementwise")
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8", torch.bool: "*i1",
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """One compiled kernel: bytes of shared memory per block, registers and bytes of local memory per thread."""

    case: str
    kernel: str
    target: tuple[int, int]
    constants: str
    warps: int
    registers: int
    local: int
    shared: int

    @property
    def fault(self) -> str:
        """Why this configuration must not ship; empty if it may."""
        if self.shared > SHARED_LIMIT[self.target]:
            return f"shared memory {self.shared} > {SHARED_LIMIT[self.target]}"
        return f"spills: {self.local} bytes of local memory per thread" if self.local else ""

    def row(self) -> str:
        """The line of the table."""
        target = f"sm_{self.target[0]}{self.target[1]}"
        return (
            f"{self.case:34} {self.kernel:20} {target:7} {self.warps:5} {self.registers:9} "
            f"{self.local:6} {self.shared:7}  {self.fault or 'ok':5} {self.constants}"
        )


HEADER = f"{'case':34} {'kernel':20} {'target':7} {'warps':>5} {'registers':>9} {'local':>6} {'shared':>7}  result"


def compile_launch(case: str, item: Launch, target: tuple[int, int]) -> Report:
    """Compile one recorded launch for `target` and read what it needs from the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = item.kernel.arg_names
    assert {*names[len(item.arguments) :]} == {*item.constants}, f"{item.kernel.__name__}: constants must come last"
    signature = {name: _type(item, name) for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(item.kernel.arg_names)
        if signature[name] != "constexpr" and _divisible(item, name)
    }
    source = ASTSource(item.kernel, signature, dict(_constants(item)), attributes)
    options = {"num_warps": item.warps, "num_stages": item.stages, "maxnreg": item.registers, **COMMON}
    built = triton.compile(source, target=GPUTarget("cuda", target[0] * 10 + target[1], 32), options=options)
    registers, local = _resources(built.asm["cubin"])
    constants = " ".join(f"{name}={value}" for name, value in item.constants.items())
    return Report(case, item.kernel.__name__, target, constants, item.warps, registers, local, built.metadata.shared)


def _constants(item: Launch) -> Iterator[tuple[tuple[int], Any]]:
    for index, name in enumerate(item.kernel.arg_names):
        if name in item.constants:
            yield (index,), item.constants[name]
        elif _type(item, name) == "constexpr":
            yield (index,), item.arguments[name]


def _type(item: Launch, name: str) -> str:
    """Triton's name for an argument's type; None and, where specialised, 1 are constants, as at run time."""
    if name in item.constants:
        return "constexpr"
    value = item.arguments[name]
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"
    if value is None or (value == 1 and isinstance(value, int) and _specialised(item, name)):
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _specialised(item: Launch, name: str) -> bool:
    index = item.kernel.arg_names.index(name)
    return not item.kernel.params[index].do_not_specialize


def _divisible(item: Launch, name: str) -> bool:
    value = item.arguments[name]
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0 and _specialised(item, name))


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) per thread, as cuobjdump prints them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        argv = [tool, "-res-usage", file.name]
        text = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert found is not None, f"cuobjdump printed no resources: {text}"
    return int(found[1]), int(found[2]) + int(found[3])


def reports(operations: list[str], targets: list[tuple[int, int]], select: str = "") -> Iterator[Report]:
    """Compile every shipped configuration of the operations, equal launches once."""
    for operation in operations:
        module = importlib.import_module(f"tests.kernels.shipped_{operation}")
        cases: dict[str, Callable[[], None]] = module.CASES
        for target in targets:
            seen = set()
            for case, run in cases.items():
                if select not in case:
                    continue
                with record_launches(target) as launches:
                    run()
                for item in launches:
                    key = (item.kernel.__name__, *(_type(item, n) for n in item.kernel.arg_names),
                           *item.constants.items(), item.warps, item.stages, item.registers)  # fmt: skip
                    if key not in seen:
                        seen.add(key)
                        yield compile_launch(case, item, target)


def available() -> list[str]:
    """Operations with a list of shipped cases."""
    return [name for name in OPERATIONS if (Path(__file__).parent / f"shipped_{name}.py").exists()]


def main(argv: list[str] | None = None) -> int:
    """Print the table; return 1 if a configuration must not ship."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operations", nargs="*", default=[])
    parser.add_argument("--targets", nargs="+", default=["80", "90", "100"], help="compute capabilities, no dot")
    parser.add_argument("--select", default="", help="only cases whose name contains this")
    options = parser.parse_args(argv)
    targets = [(int(name[:-1]), int(name[-1])) for name in options.targets]
    faults = 0
    print(HEADER)
    for report in reports(options.operations or available(), targets, options.select):
        faults += bool(report.fault)
        print(report.row(), flush=True)
    return int(faults > 0)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
