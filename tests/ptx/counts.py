"""What the compiled kernels do, counted while they run from their PTX: `python tests/ptx/counts.py [operation ...]`.

Frozen: it gets no new feature until a measurement on a GPU has confirmed a conclusion drawn from it.

Per kernel: the instructions that warps issue, by the unit that executes them; passes through the banks of shared memory
next to the passes without conflicts (without what matrix products read by themselves); and 32-byte sectors of global
memory next to the bytes requested. These are exact except for arithmetic, which ptxas still rearranges. The last
columns are the microseconds that each unit of an H100 would need if it were alone: lower bounds, not times, since
nothing is known of waiting.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402

from ptx import machine as running  # noqa: E402
from ptx.driver import install  # noqa: E402
from ptx.memory import Space  # noqa: E402
from ptx.parse import Instruction  # noqa: E402

#: Warp instructions per clock and multiprocessor of an H100 (CUDA programming guide, arithmetic throughput); its clock
#: in GHz under load, its multiprocessors, and bytes per microsecond of a copy (docs/lab-log.md).
RATES = {"special": 0.5, "issue": 4.0, "banks": 1.0}
CLOCK, MULTIPROCESSORS, COPY = 1.7, 132, 3.0e6
UNITS = {
    "special": ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "div.full", "div.approx"),
    "convert": ("cvt",),
    "float": ("fma", "add.f32", "mul.f32", "sub.f32", "add.ftz", "mul.ftz", "max.f32", "min.f32", "neg.f32"),
    "tensor": ("mma", "wgmma.mma"),
    "memory": ("ld", "st", "cp", "ldmatrix", "stmatrix"),
    "exchange": ("shfl", "redux"),
    "control": ("bar", "bra", "ret", "wgmma", "fence", "mbarrier", "elect"),
    "moves": ("mov", "cvta"),
}


class Counts:
    """Of one kernel."""

    def __init__(self) -> None:
        self.blocks = 0
        self.issued: Counter[str] = Counter()
        self.banks = self.banks_ideal = self.sectors = self.bytes = self.flops = 0
        self.by_access: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
        self.by_instruction: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])


_all: defaultdict[str, Counts] = defaultdict(Counts)
_current = Counts()
_text = ""


def unit(instruction: Instruction) -> str:
    """The unit that executes it; integers, predicates and selections by default."""
    name = instruction.name
    return next((unit for unit, heads in UNITS.items() if name.startswith(heads)), "whole")


def _counted(step: running.Step, instruction: Instruction) -> running.Step:
    kind, flops = unit(instruction), _flops(instruction)

    def run(machine: running.Machine) -> int | None:
        mask = machine.active
        if instruction.guard is not None:
            taken = machine.registers[instruction.guard.name] != instruction.negated
            mask = taken if mask is None else mask & taken
        warps = machine.threads // 32 if mask is None else int(mask.reshape(-1, 32).any(1).sum())
        _current.issued[kind] += warps
        _current.flops += warps * flops
        global _text
        _text = instruction.text
        return step(machine)

    return run


def _flops(instruction: Instruction) -> int:
    """Operations that one of its warps does for a matrix product."""
    name = instruction.name
    if name.startswith("mma"):
        return 2 * 16 * 8 * (8 if "k8" in name else 16)
    if name.startswith("wgmma.mma"):
        columns, depth = name.split("m64n")[1].split(".")[0].split("k")
        return 2 * 16 * int(columns) * int(depth)
    return 0


def _observe(space: Space, offsets: np.ndarray, size: int, warps: np.ndarray) -> None:
    """One access of `size` bytes at each offset."""
    for warp in np.unique(warps):
        own = offsets[warps == warp]
        if space.name != "shared memory":
            sectors, ideal = len(np.unique(own // 32)), -(-len(np.unique(own)) * size // 32)
            _current.sectors += sectors
            _current.bytes += len(np.unique(own)) * size
            entry = _current.by_access[_text]
            entry[0] += sectors
            entry[1] += ideal
            continue
        lanes = 32 * 4 // max(size, 4)  # as many as request 128 bytes
        for begin in range(0, len(own), lanes):
            words = np.unique((own[begin : begin + lanes, None] + np.arange(0, max(size, 4), 4)) // 4)
            passes, ideal = int(np.bincount(words % 32).max()), -(-len(words) // 32)
            _current.banks += passes
            _current.banks_ideal += ideal
            entry = _current.by_instruction[_text]
            entry[0] += passes
            entry[1] += ideal


@contextmanager
def counting() -> Iterator[None]:
    """Count all that runs inside."""
    plain = running.build
    running.build = lambda kernel: [_counted(s, i) for s, i in zip(plain(kernel), kernel.code, strict=True)]
    inner = running.Machine.run

    def run(machine: running.Machine) -> None:
        global _current
        _current = _all[machine.kernel.name]
        _current.blocks += machine.grid[0] * machine.grid[1] * machine.grid[2]
        inner(machine)

    running.Machine.run, Space.observer = run, staticmethod(_observe)
    try:
        yield
    finally:
        running.build, running.Machine.run, Space.observer = plain, inner, None


def attention(length: int, dropout: float) -> None:
    """One sequence, one head of 64."""
    from exlm_dist.kernels.attention import attention_packed, rotary_angles

    position = torch.arange(length)
    qkv = torch.randn(length, 1, 3, 64).bfloat16().requires_grad_()
    angles, starts = rotary_angles(position, position % 5, 64), torch.tensor([0, length])
    out = attention_packed(qkv, angles, starts, length, dropout=dropout, seed=5, backend="triton")
    out.backward(torch.randn_like(out))


def transitions(states: int, kind: str) -> None:
    """One sequence, 12 heads of 64; `kind` of the prior over jumps, if not none."""
    from exlm_dist.kernels.transitions import JumpPrior, transition_log_probs

    rule = {"states_per_target": 4, "prior": None if kind == "none" else JumpPrior(kind, 0.125, 12.0)}
    inputs = [torch.randn(*s).bfloat16().requires_grad_() for s in ((states, 12, 64), (states, 12, 64), (states, 12))]
    out = transition_log_probs(*inputs, torch.tensor([0, states]), states, **rule, backend="triton")
    out.backward(torch.rand_like(out))


def dag(targets: int) -> None:
    """One sequence."""
    from exlm_dist.kernels.dag import dag_log_likelihood

    states = 4 * targets
    match = torch.randn(1, targets, states, requires_grad=True)
    edges = torch.randn(1, states, states).triu(1).masked_fill(torch.ones(states, states).tril().bool(), -torch.inf)
    edges = edges.log_softmax(-1).nan_to_num(nan=-torch.inf).requires_grad_()
    sizes = [torch.tensor([size]) for size in (targets, states)]
    dag_log_likelihood(match, edges, *sizes, backend="triton").sum().backward()


def vocab(rows: int, words: int) -> None:
    """`rows` states of one sequence, width 768."""
    from exlm_dist.kernels.vocab import match_scores

    inputs = [torch.randn(*s).bfloat16().requires_grad_() for s in ((rows, 768), (words, 768), (words,))]
    ids, starts = torch.randint(words, (rows // 4,)), [torch.tensor([0, rows]), torch.tensor([0, rows // 4])]
    out = match_scores(*inputs, ids, *starts, rows, rows // 4, backend="triton")
    out.backward(torch.rand_like(out))


def elementwise(rows: int) -> None:
    """Width 768, and 3,072 for gelu."""
    from exlm_dist.kernels.elementwise import add_norm, gelu_gradient_

    inputs = [torch.randn(*s).bfloat16().requires_grad_() for s in ((rows, 768), (rows, 768), (768,), (768,))]
    hidden, normed = add_norm(*inputs, eps=1e-5, dropout=0.1, seed=5, backend="triton")
    torch.autograd.backward([hidden, normed], [torch.randn_like(hidden), torch.randn_like(hidden)])
    gelu_gradient_(torch.randn(rows, 3072).bfloat16(), torch.randn(rows, 3072).bfloat16(), backend="triton")


CASES: dict[str, list[tuple[str, Callable[[], None], int]]] = {
    # (what, how to run it, how often a step of the base shape has it in one layer or in all)
    "attention": [
        (f"attention n={n}{' dropout' if p else ''}", lambda n=n, p=p: attention(n, p), 12 * count)
        for n, count in ((191, 512), (746, 128))
        for p in (0.0, 0.1)
    ],
    "transitions": [
        (f"transitions L={n}, prior {kind}", lambda n=n, kind=kind: transitions(n, kind), c)
        for n, c in ((84, 512), (312, 128))
        for kind in ("none", "group")
    ],
    "dag": [(f"dag N={n}", lambda n=n: dag(n), c) for n, c in ((21, 512), (78, 128))],
    "vocab": [("vocab 128 rows x 512 words", lambda: vocab(128, 512), 336 * 98)],
    "elementwise": [("elementwise 32 rows", lambda: elementwise(32), 3056)],
}


def table(times: int) -> str:
    """A line per kernel; bounds for `times` as much work."""
    kinds = ["tensor", "special", "convert", "float", "whole", "moves", "exchange", "memory", "control"]
    lines = [f"{'kernel':24} {'blocks':>6} " + " ".join(f"{kind:>8}" for kind in kinds)]
    lines[0] += f" {'banks':>8} {'ideal':>8} {'sectors':>8} {'ideal':>8} | us: tensor special  issue  banks   copy"
    for name, counts in _all.items():
        line = f"{name:24} {counts.blocks:6} " + " ".join(f"{counts.issued[kind]:8}" for kind in kinds)
        line += f" {counts.banks:8} {counts.banks_ideal:8} {counts.sectors:8} {counts.bytes // 32:8} |"
        clocks = {
            "special": counts.issued["special"] / RATES["special"],
            "issue": sum(counts.issued.values()) / RATES["issue"],
            "banks": counts.banks / RATES["banks"],
        }
        scale = times / MULTIPROCESSORS / CLOCK / 1e3
        bounds = [counts.flops * times / 785e6, *(clocks[kind] * scale for kind in ("special", "issue", "banks"))]
        lines.append(line + " ".join(f"{bound:7.0f}" for bound in [*bounds, counts.sectors * 32 * times / COPY]))
    return "\n".join(lines)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", metavar="operation", help=f"of {', '.join(CASES)}")
    parser.add_argument("--capability", default="90", choices=("80", "90"))
    parser.add_argument(
        "--conflicts", type=int, default=0, help="list so many of the instructions with most bank conflicts"
    )
    options = parser.parse_args()
    from exlm_dist.kernels import launch

    launch.DEFAULT_CAPABILITY = (int(options.capability[0]), int(options.capability[1]))
    install(launch.DEFAULT_CAPABILITY)
    torch.manual_seed(0)
    for operation in options.operations or CASES:
        for what, run, times in CASES[operation]:
            _all.clear()
            with counting():
                run()
            print(f"{what}, x {times}", table(times), "", sep="\n", flush=True)
            for name, counts in _all.items() if options.conflicts else ():
                worst = sorted(counts.by_access.items(), key=lambda item: -item[1][0])
                for text, (sectors, ideal) in worst[: options.conflicts]:
                    print(f"    {name:24} {sectors:8} sectors, ideal {ideal:8}: {text}")
                worst = sorted(counts.by_instruction.items(), key=lambda item: item[1][1] - item[1][0])
                for text, (passes, ideal) in worst[: options.conflicts]:
                    print(f"    {name:24} {passes:8} passes, ideal {ideal:8}: {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
