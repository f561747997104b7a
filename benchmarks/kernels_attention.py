"""Attention, forward and backward with rotary positions, beside what torch offers.

"full": all sequences equally long, the best case of the padded forms (no mask, no padding). "ragged": lengths spread
evenly over the upper half, so that the padded forms need a mask. The other sides get q, k, v in the layout that suits
them best (padding and packing are not timed) and rotary positions through torch.compile; ours reads and fills one
q-k-v matrix, as in the model.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from timing import Case
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from exlm_dist.kernels.attention import attention_packed, naive, rotary_angles, schedule
from exlm_dist.kernels.attention.schedule import UNLIMITED, Range, Tiles

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
#: Alternatives to the shipped tiles, by kernel: wider tiles read less from the L2 cache, loads that run ahead hide its
#: latency, fewer registers let more programs fit on a multiprocessor. None of them spills for sm_90 with Triton 3.6.
VARIANTS = {
    "forward wide": {"forward": Tiles(128, 64, 1, 8, stages=2, registers=128)},
    "queries wide": {"queries": Tiles(128, 64, 1, 8, stages=2)},
    "queries wide, 128 registers": {"queries": Tiles(128, 64, 1, 8, stages=2, registers=128)},
    "keys ahead": {"keys": Tiles(64, 64, 1, 4, stages=2)},
    "keys ahead, 32 queries": {"keys": Tiles(32, 64, 1, 4, stages=2)},
    "keys wide": {"keys": Tiles(64, 128, 1, 8)},
    "keys wide, ahead": {"keys": Tiles(64, 128, 1, 8, stages=2)},
}
COPY, PRODUCT = 3.0e12, 790e12  # bytes/s and FLOP/s of an H100, for the floors


def cases(device: torch.device, toy: bool) -> Iterator[Case]:
    """n~191 (S=128) and n~746 (S=512) at H=12, P=64; heads of 16 x 64 (large); dropout."""
    if toy:
        yield Batch([33, 20], 2, 32, device, torch.float32, 0.0, compiled=False).case("ragged", None, None)
        return
    for longest, count, least, aim in ((191, 512, 1.0, 1.3), (746, 128, 1.0, 1.1)):
        spread = torch.linspace(longest // 2, longest, count).long().tolist()
        yield Batch([longest] * count, 12, 64, device, torch.bfloat16, 0.0).case("full", least, aim)
        yield Batch(spread, 12, 64, device, torch.bfloat16, 0.0).case("ragged", least, aim)
        yield Batch([longest] * count, 16, 64, device, torch.bfloat16, 0.0).case("full, large", least, aim)
        yield Batch([longest] * count, 12, 64, device, torch.bfloat16, 0.1).case("full, dropout 0.1", least, aim)


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """rotate-half of q and k [..., H, P] by tables [..., 1, P/2]."""

    def rotate(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)

    return rotate(q), rotate(k)


class Batch:
    """One packed batch and its padded copy, and the sides that work on them."""

    def __init__(
        self, lengths: list[int], heads: int, width: int, device: torch.device, dtype: torch.dtype, dropout: float,
        compiled: bool = True,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.lengths, self.heads, self.width, self.dropout = lengths, heads, width, dropout
        self.longest, self.tokens = max(lengths), sum(lengths)
        starts = torch.tensor([0, *itertools.accumulate(lengths)])
        self.cu_tokens = starts.to(device)
        sizes = torch.tensor(lengths, device=device)
        self.inside = torch.arange(self.longest, device=device) < sizes[:, None]
        position = torch.cat([torch.arange(length) for length in lengths]).to(device)
        self.angles = rotary_angles(position, (position % 5 - 1).clamp(min=0), width)
        self.packed = torch.randn(self.tokens, heads, 3, width, device=device).to(dtype).requires_grad_()
        parts = self.packed.detach().unbind(2)
        self.grad = torch.randn(self.tokens, heads, width, device=device).to(dtype)
        self.loose = [part.contiguous().requires_grad_() for part in parts]
        self.padded = [self._pad(part).requires_grad_() for part in parts]
        self.padded_grad = self._pad(self.grad).transpose(1, 2)
        self.tables = [entry[:, None] for entry in (self.angles.cos(), self.angles.sin())]
        self.padded_tables = [self._pad(entry) for entry in self.tables]
        torch.compiler.reset()  # each shape compiled on its own: with too many, a function falls back to eager
        self.rotate = torch.compile(_rotate, dynamic=False) if compiled else _rotate
        self.compiled = compiled
        self.mask = None if bool(self.inside.all()) else self.inside[:, None, None]
        self.wanted: list[Tensor] | None = None

    def _pad(self, rows: Tensor) -> Tensor:
        """[T, ...] as [B, n, ...], 0 where there is no token."""
        out = rows.new_zeros(len(self.lengths), self.longest, *rows.shape[1:])
        out[self.inside] = rows
        return out

    def variants(self, kind: str) -> Case:
        """The shipped tiles beside `VARIANTS`."""
        sides = {"ours": self._ours} | {f"ours, {name}": self._variant(changes) for name, changes in VARIANTS.items()}
        return self._case(kind, sides, None, None)

    def case(self, kind: str, least: float | None, aim: float | None) -> Case:
        """The comparison; `kind` says how the lengths are spread."""
        sides = {"ours": self._ours}
        if self.longest > schedule.SHORT:
            sides["ours, short form"] = self._short
        if self.cu_tokens.device.type == "cuda":
            sides |= {f"sdpa {name}": self._sdpa(name) for name in BACKENDS if self.mask is None or name != "flash"}
            if not self.dropout:
                sides |= {"varlen_attn": self._varlen, "flex": self._flex()}
        else:
            sides["sdpa math"] = self._sdpa(None)
        return self._case(kind, sides, least, aim)

    def _case(self, kind: str, sides: dict[str, Callable[[], Tensor]], least: float | None, aim: float | None) -> Case:
        squares = sum(length * length for length in self.lengths)
        token_bytes = 2 * self.heads * self.width * self.tokens
        floors = {
            "memory (12 passes over one operand)": 12 * token_bytes / COPY * 1e3,
            "tensor cores (7 products)": 14 * squares * self.heads * self.width / PRODUCT * 1e3,
        }
        sizes = f"{kind}, n {min(self.lengths)}..{self.longest}, B={len(self.lengths)}, H={self.heads}, P={self.width}"
        bound = 2e-2 if self.grad.dtype == torch.bfloat16 else 1e-5
        runs = {name: self._whole(name, side) for name, side in sides.items()}
        return Case("attention", sizes, "ours", runs, lambda name: self._error(runs[name]()), bound, least, aim, floors)

    def _whole(self, name: str, side: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        """Forward and backward of a side: [out, grad q, grad k, grad v]."""
        if name.startswith("ours"):
            inputs, grad = [self.packed], self.grad
        elif name == "varlen_attn":
            inputs, grad = self.loose, self.grad
        else:
            inputs, grad = self.padded, self.padded_grad

        def run() -> list[Tensor]:
            out = side()
            return [out, *torch.autograd.grad(out, inputs, grad)]

        return run

    def _ours(self) -> Tensor:
        return attention_packed(self.packed, self.angles, self.cu_tokens, self.longest, dropout=self.dropout, seed=1)

    def _short(self) -> Tensor:
        """Keys rotated where they are read, at every length."""
        limit, schedule.SHORT = schedule.SHORT, schedule.UNLIMITED
        try:
            return self._ours()
        finally:
            schedule.SHORT = limit

    def _variant(self, changes: dict[str, Tiles]) -> Callable[[], Tensor]:
        """Ours with other tiles for one kernel, at every length; for all but `keys`, keys are rotated before."""
        kernels = importlib.import_module("exlm_dist.kernels.attention.triton")
        ranges = {name: [Range(0, UNLIMITED, tiles, rotated=name != "keys")] for name, tiles in changes.items()}

        def run() -> Tensor:
            chosen = kernels.plan
            kernels.plan = lambda *sizes: dataclasses.replace(chosen(*sizes), **ranges)
            try:
                return self._ours()
            finally:
                kernels.plan = chosen

        return run

    def _varlen(self) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        q, k = self.rotate(*self.loose[:2], *self.tables)
        starts = self.cu_tokens.int()
        return varlen_attn(q, k, self.loose[2], starts, starts, self.longest, self.longest)

    def _heads_first(self) -> list[Tensor]:
        q, k = self.rotate(*self.padded[:2], *self.padded_tables)
        return [part.transpose(1, 2) for part in (q, k, self.padded[2])]

    def _sdpa(self, backend: str | None) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(BACKENDS[backend] if backend else SDPBackend.MATH):
                return F.scaled_dot_product_attention(*self._heads_first(), attn_mask=self.mask, dropout_p=self.dropout)

        return run

    def _flex(self) -> Callable[[], Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        sizes = self.inside.sum(1)
        blocks = create_block_mask(
            lambda b, h, q, kv: kv < sizes[b], len(self.lengths), None, self.longest, self.longest, self.inside.device
        )
        call = torch.compile(flex_attention, dynamic=False)
        return lambda: call(*self._heads_first(), block_mask=blocks)

    def _error(self, found: list[Tensor]) -> float | None:
        """Largest relative error (Frobenius) of output and gradients from the definition; None under dropout."""
        if self.dropout:
            return None if all(bool(tensor.isfinite().all()) for tensor in found) else float("nan")
        if self.wanted is None:
            parts = [part.float().requires_grad_() for part in self.packed.detach().unbind(2)]
            out = naive.attention(*parts, self.angles, self.cu_tokens)
            self.wanted = [out.detach(), *torch.autograd.grad(out, parts, self.grad.float())]
        if len(found) == 2:
            found = [found[0], *found[1].unbind(2)]
        errors = []
        for index, (got, want) in enumerate(zip(found, self.wanted)):
            if got.dim() == 4:
                got = (got.transpose(1, 2) if index == 0 else got)[self.inside]
            errors.append(float((got.detach().float() - want).norm() / want.norm()))
        return max(errors)
