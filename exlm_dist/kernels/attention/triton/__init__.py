"""Attention in Triton: packed sequences, rotary positions applied in the kernel, reproducible dropout (README.md).

Which tiles compute a sequence depends on its own length alone (`schedule.py`), so the other sequences of the batch
never change its values: where a batch needs several kinds of tiles, all are launched and each skips the others'
sequences. No atomics anywhere.
"""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from exlm_dist.kernels.attention.mask import DropoutMask
from exlm_dist.kernels.attention.schedule import Range, plan
from exlm_dist.kernels.attention.triton.backward import backward_keys, backward_queries
from exlm_dist.kernels.attention.triton.forward import forward
from exlm_dist.kernels.attention.triton.rotary import rotate
from exlm_dist.kernels.launch import capability, cdiv, launch, next_power_of_2
from exlm_dist.kernels.randomness import seed_tensor

LOG2_E = math.log2(math.e)
DROP_BITS = 16
#: Tokens per program of `rotate`.
ROTATED_ROWS = 64


def attention(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor, cu_tokens: Tensor, max_tokens: int, mask: DropoutMask
) -> Tensor:
    """See `exlm_dist.kernels.attention.attention`. Head widths 32, 64, 96, 128; fp32, bf16, fp16; else ValueError."""
    _check(q)
    return _Attention.apply(*_with_equal_strides(q, k, v), angles, cu_tokens, max_tokens, mask)


def attention_packed(
    qkv: Tensor, bias: Tensor | None, angles: Tensor, cu_tokens: Tensor, max_tokens: int, mask: DropoutMask
) -> Tensor:
    """See `exlm_dist.kernels.attention.attention_packed`; limits as for `attention`."""
    _check(qkv)
    return _Packed.apply(qkv if qkv.stride(-1) == 1 else qkv.contiguous(), bias, angles, cu_tokens, max_tokens, mask)


def _check(operand: Tensor) -> None:
    width = operand.shape[-1]
    if width % 32 or not 32 <= width <= 128:
        raise ValueError(f"the attention kernels take head widths 32, 64, 96 and 128, not {width}; use 'torch'")
    if operand.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the attention kernels take float32, bfloat16 and float16, not {operand.dtype}")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, angles, cu_tokens, max_tokens, mask):
        ctx.call = _Call(q, angles, cu_tokens, max_tokens, mask)
        out, lse = ctx.call.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        grads = torch.empty((3, *grad_out.shape), dtype=grad_out.dtype, device=grad_out.device)
        ctx.call.backward(*ctx.saved_tensors, grad_out, *grads, None)
        return *grads, None, None, None, None


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, bias, angles, cu_tokens, max_tokens, mask):
        q, k, v = qkv.unbind(2)
        ctx.call = _Call(q, angles, cu_tokens, max_tokens, mask)
        out, lse = ctx.call.forward(q, k, v)
        ctx.save_for_backward(qkv, out, lse)
        ctx.bias_shape = None if bias is None else bias.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        qkv, out, lse = ctx.saved_tensors
        grads = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        sums = ctx.call.sums() if ctx.needs_input_grad[1] else None
        ctx.call.backward(*qkv.unbind(2), out, lse, grad_out, *grads.unbind(2), sums)
        grad_bias = None if sums is None else sums.sum(0).view(ctx.bias_shape).to(qkv.dtype)
        return grads, grad_bias, None, None, None, None


class _Call:
    """What forward and backward of one call have in common: sizes, rotary table, dropout, tiles."""

    def __init__(
        self, q: Tensor, angles: Tensor, cu_tokens: Tensor, max_tokens: int, mask: DropoutMask
    ) -> None:
        self.tokens, self.heads, self.width = q.shape
        self.max_tokens = max(max_tokens, 1)
        self.sequences = len(cu_tokens) - 1
        self.dropped = min(round(mask.probability * 2**DROP_BITS), 2**DROP_BITS - 1)
        self.plan = plan(self.width, q.dtype.itemsize, self.dropped > 0, capability(q.device))
        self.arguments = {
            "table": _rotary_table(angles, packed=q.dtype != torch.float32), "cu_seqlens": cu_tokens.contiguous(),
            "tokens": self.tokens, "sequences": self.sequences,
            "heads": self.heads, "stride": q.stride(0), "stride_head": q.stride(1),
            "scale": self.width**-0.5 * LOG2_E, "first_head": mask.first_head,
            "seed": seed_tensor(mask.seed, q.device) if self.dropped else None, "site": mask.site,
            "dropped": self.dropped - (self.dropped >> 15 << 16) << 16,
            "dropout_scale": 2**DROP_BITS / (2**DROP_BITS - self.dropped),
            # a zero that the compiler does not see: given 0.0, it selects after rounding, which costs more
            "opaque_zero": 0.0,
        }  # fmt: skip
        rows = [part.tiles.queries for part in self.plan.queries] + [part.tiles.keys for part in self.plan.keys]
        self.slot_rows = min(rows)
        half = self.width // 2
        self.constants = {
            "P": self.width, "HALF": half, "BP": next_power_of_2(self.width),
            "BH": next_power_of_2(half), "DROPOUT": self.dropped > 0,
        }  # fmt: skip

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(out [T, H, P], lse [H, T])."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty((self.heads, self.tokens), dtype=torch.float32, device=q.device)
        rotated = self._rotate(k) if self._long(self.plan.forward) else None
        self._start(forward, self.plan.forward, "queries", q=q, k=k, v=v, rotated=rotated, out=out, lse=lse)
        return out, lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
        grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, sums: Tensor | None,
    ) -> None:  # fmt: skip
        """Fill the three gradients [T, H, P], of equal strides, and their `sums` over each tile's rows."""
        shape = (self.tokens, self.heads, self.constants["BP"])
        long = self._long(self.plan.queries)
        rotated = self._rotate(q, k) if long else torch.empty(shape, dtype=q.dtype, device=q.device)
        common = {
            "k": k, "v": v, "grad_out": grad_out.contiguous(), "lse": lse, "rotated": rotated,
            "delta": torch.empty_like(lse), "grad_scale": self.width**-0.5, "sums": sums,
            "slot_rows": self.slot_rows,
            "stride_grad": grad_q.stride(0), "stride_grad_head": grad_q.stride(1),
        }  # fmt: skip
        self._start(backward_queries, self.plan.queries, "queries", q=q, out=out, grad_q=grad_q, **common)
        self._start(backward_keys, self.plan.keys, "keys", grad_k=grad_k, grad_v=grad_v, **common)

    def sums(self) -> Tensor:
        """Zeros [slots, H, 3, P] for the sums of the gradients over the rows of each tile."""
        slots = self.tokens // self.slot_rows + self.sequences
        shape = (slots, self.heads, 3, self.width)
        return torch.zeros(shape, dtype=torch.float32, device=self.arguments["table"].device)

    def _long(self, ranges: list[Range]) -> bool:
        """Whether the batch can have sequences whose keys are rotated beforehand."""
        return any(part.rotated and part.lower < self.max_tokens for part in ranges)

    def _rotate(self, *operands: Tensor) -> Tensor:
        """The keys, or queries and keys, rotated by their angles: [1 or 2, T, H, BP]."""
        shape = (len(operands), self.tokens, self.heads, self.constants["BP"])
        rotated = torch.empty(shape, dtype=operands[0].dtype, device=operands[0].device)
        names = ("table", "tokens", "heads", "stride", "stride_head")
        arguments = {name: self.arguments[name] for name in names}
        arguments |= {"first": operands[0], "second": operands[-1], "rotated": rotated}
        constants = {name: self.constants[name] for name in ("P", "HALF", "BP", "BH")} | {"ROWS": ROTATED_ROWS}
        grid = (cdiv(self.tokens, ROTATED_ROWS), self.heads * len(operands))
        launch(rotate, grid, arguments, constants)
        return rotated

    def _start(self, kernel, ranges: list[Range], over: str, **arguments) -> None:
        """Launch `kernel` once per range of lengths that the batch can have; the first also zeroes the padding."""
        for index, found in enumerate(part for part in ranges if part.lower < self.max_tokens):
            tiles, tail = found.tiles, index == 0
            rows = tiles.queries * tiles.resident if over == "queries" else tiles.keys
            chunks = cdiv(min(self.max_tokens, found.upper), rows)
            bounds = {"chunks": chunks, "lower": found.lower, "upper": found.upper}
            constants = {**self.constants, "BQ": tiles.queries, "BK": tiles.keys, "TAIL": tail}
            if kernel is forward:
                constants["TILES"] = tiles.resident
            else:
                constants["SUMS"] = arguments["sums"] is not None
            if over == "queries":
                constants["ROTATED"] = found.rotated
            grid = ((self.sequences + tail) * self.heads * chunks,)
            settings = {"warps": tiles.warps, "stages": tiles.stages, "registers": tiles.registers}
            launch(kernel, grid, {**self.arguments, **arguments, **bounds}, constants, **settings)


def _with_equal_strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three with equal strides and contiguous heads: as they are if slices of one matrix, else copies."""
    if q.stride() == k.stride() == v.stride() and q.stride(2) == 1:
        return q, k, v
    return q.contiguous(), k.contiguous(), v.contiguous()


_latest: tuple[weakref.ref[Tensor], int, bool, Tensor] | None = None


def _rotary_table(angles: Tensor, packed: bool) -> Tensor:
    """Cosines and sines of `angles` [T, P/2], kept until other angles come: one table for all layers of a step.

    fp32 [T, P]; `packed` int32 [T, P/2], each word a cosine (lower half) and a sine in fp16: half the bytes for every
    tile of every head to read, and four times as exact as the bf16 that the rotated operands are rounded to.
    While a CUDA graph is captured nothing is kept, so that a replay computes the table from the angles it finds.
    """
    global _latest
    capturing = angles.is_cuda and torch.cuda.is_current_stream_capturing()
    latest = _latest
    if not capturing and latest is not None and latest[0]() is angles and latest[1:3] == (angles._version, packed):
        return latest[3]
    table = _packed_table(angles.detach().float()) if packed else _table(angles.detach().float())
    if not capturing:
        _latest = weakref.ref(angles), angles._version, packed, table
    return table


def _table(angles: Tensor) -> Tensor:
    half = angles.shape[1]
    table = torch.empty((len(angles), 2 * half), dtype=torch.float32, device=angles.device)
    torch.cos(angles, out=table[:, :half])
    torch.sin(angles, out=table[:, half:])
    return table


def _packed_table(angles: Tensor) -> Tensor:
    table = torch.empty((*angles.shape, 2), dtype=torch.float16, device=angles.device)
    table[..., 0] = angles.cos()
    table[..., 1] = angles.sin()
    return table.view(torch.int32).squeeze(-1)
