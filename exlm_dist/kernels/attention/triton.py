"""Attention kernels: packed sequences, rotary positions turned in the kernel, reproducible dropout (maths: README.md).

Two forms, picked by the length of each single sequence (`schedule.py`), so that batch-mates never change how it is computed:
short: one program holds all queries of a (sequence, head), and its backward needs five products and no second kernel;
long: tiles of queries forward, then one kernel for grad q and one for grad k and v. No atomics anywhere.

Letters: T tokens, H heads, P head width, n tokens of one sequence. Tiles: BQ queries, BK keys, TILES query tiles a program.
Names: o_ offsets, p_ pointers, b_ loaded tile. q and k are held as two halves of P/2, so that turning them needs no shuffle.
The statistic kept for the backward pass is log2 of the sum of 2^(score * log2(e)), fp32 [H, T].
"""

from __future__ import annotations

import math
import weakref

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from exlm_dist.kernels.attention.schedule import Form, forms
from exlm_dist.kernels.launch import capability, launch

LOG2_E = math.log2(math.e)
DROP_BITS = 24


@triton.jit
def _mixed(x):
    """A 32-bit integer hash (two multiplications, Wellons' lowbias32): every input bit flips each output bit half the time."""
    x = (x ^ (x >> 16)) * tl.full([], 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _row_keys(seed_low, seed_high, sequence, head, o_query):
    """Start of each query row's stream of random words: a hash of (seed, sequence, head, query)."""
    gamma = tl.full([], 0x9E3779B9, tl.uint32)
    key = _mixed(tl.cast(seed_low, tl.uint32, bitcast=True) + gamma)
    key = _mixed(key ^ tl.cast(seed_high, tl.uint32, bitcast=True))
    key = _mixed(key + sequence.to(tl.uint32) * gamma)
    key = _mixed(key + head.to(tl.uint32) * gamma)
    return _mixed(key + o_query.to(tl.uint32) * gamma)


@triton.jit
def _kept(b_row_key, o_key, dropped):
    """Whether weight (query, key) stays: word number `key` of the row's stream (splitmix), against dropped / 2^24."""
    word = _mixed(b_row_key + o_key.to(tl.uint32) * tl.full([], 0x9E3779B9, tl.uint32))
    return (word >> 8).to(tl.int32) >= dropped


@triton.jit
def _load_rows(p_base, o_row, limit, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Tile [rows, BLOCK]: WIDTH columns of the rows below `limit`, else 0."""
    o_column = tl.arange(0, BLOCK)
    inside = (o_row < limit)[:, None]
    if BLOCK != WIDTH:
        inside = inside & (o_column < WIDTH)[None, :]
    return tl.load(p_base + o_row[:, None] * stride + o_column[None, :], mask=inside, other=0.0)


@triton.jit
def _store_rows(p_base, b_tile, o_row, limit, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write the rows below `limit` of a tile [rows, BLOCK], WIDTH columns."""
    o_column = tl.arange(0, BLOCK)
    inside = (o_row < limit)[:, None]
    if BLOCK != WIDTH:
        inside = inside & (o_column < WIDTH)[None, :]
    tl.store(p_base + o_row[:, None] * stride + o_column[None, :], b_tile.to(p_base.dtype.element_ty), mask=inside)


@triton.jit
def _load_turned(p_base, p_table, o_row, limit, stride, ROWS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of q or k turned by their angles: [ROWS, 2 * BLOCK], the second half from column BLOCK on."""
    b_first = _load_rows(p_base, o_row, limit, stride, HALF, BLOCK)
    b_second = _load_rows(p_base + HALF, o_row, limit, stride, HALF, BLOCK)
    b_cos = _load_rows(p_table, o_row, limit, 2 * HALF, HALF, BLOCK)
    b_sin = _load_rows(p_table + HALF, o_row, limit, 2 * HALF, HALF, BLOCK)
    b_low = (b_first.to(tl.float32) * b_cos - b_second.to(tl.float32) * b_sin).to(b_first.dtype)
    b_high = (b_second.to(tl.float32) * b_cos + b_first.to(tl.float32) * b_sin).to(b_first.dtype)
    return tl.reshape(tl.permute(tl.join(b_low, b_high), (0, 2, 1)), [ROWS, 2 * BLOCK])


@triton.jit
def _store_turned_back(
    p_base, p_table, b_grad, o_row, limit, stride, ROWS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the gradient [ROWS, 2 * BLOCK] of q or k: turned by minus the angles."""
    b_low, b_high = tl.split(tl.permute(tl.reshape(b_grad, [ROWS, 2, BLOCK]), (0, 2, 1)))
    b_cos = _load_rows(p_table, o_row, limit, 2 * HALF, HALF, BLOCK)
    b_sin = _load_rows(p_table + HALF, o_row, limit, 2 * HALF, HALF, BLOCK)
    _store_rows(p_base, b_low * b_cos + b_high * b_sin, o_row, limit, stride, HALF, BLOCK)
    _store_rows(p_base + HALF, b_high * b_cos - b_low * b_sin, o_row, limit, stride, HALF, BLOCK)


@triton.jit
def _product(b_left, b_right, b_sum):
    """b_sum + b_left @ b_right in fp32 (fp32 operands are not rounded to TF32)."""
    return tl.dot(b_left, b_right, b_sum, input_precision="ieee")


@triton.jit
def _place(cu, sequences, heads, chunks):
    """What this program works on: (sequence, head, chunk, first token, tokens); sequence == `sequences` is the padding."""
    program = tl.program_id(0)
    chunk = program % chunks
    head = (program // chunks) % heads
    sequence = program // chunks // heads
    first = tl.load(cu + sequence)
    return sequence, head, chunk, first


@triton.jit
def _zero_tail(p_out, first, tokens, chunk, chunks, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Zero rows `first`.. of one head; the programs of the head share them by chunk."""
    o_row = tl.arange(0, ROWS)
    for row in range(chunk * ROWS, (tokens - first).to(tl.int32), chunks * ROWS):
        base = p_out + (first + row) * stride
        _store_rows(base, tl.zeros([ROWS, BLOCK], tl.float32), o_row, tokens - first - row, stride, WIDTH, BLOCK)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "dropped", "lower", "upper"])
def _forward(
    q, k, v,  # [T, H, P] in, strides (stride, stride_head, 1)
    table,  # [T, P] fp32 in: cosines and sines
    cu,  # [sequences + 1] int64 in
    out,  # [T, H, P] out, contiguous
    statistic,  # [H, T] fp32 out
    tokens, sequences, heads, chunks, lower, upper, stride, stride_head,
    scale, seed_low, seed_high, dropped, dropout_scale,
    P: tl.constexpr, HALF: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr, DROPOUT: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One program: TILES * BQ queries of one sequence and head, if its length is in (lower, upper]."""
    sequence, head, chunk, first = _place(cu, sequences, heads, chunks)
    stride_out = heads * P
    if TAIL:
        if sequence == sequences:
            _zero_tail(out + head * P, first, tokens, chunk, chunks, stride_out, P, BP, BQ)
            return
    count = (tl.load(cu + sequence + 1) - first).to(tl.int32)
    if count <= lower or count > upper or chunk * (TILES * BQ) >= count:
        return
    o_query = tl.arange(0, BQ)
    o_key = tl.arange(0, BK)
    begin = first + chunk * (TILES * BQ)
    left = count - chunk * (TILES * BQ)
    p_q = q + begin * stride + head * stride_head
    p_turn = table + begin * P
    b_q, b_sum, b_total, b_top, b_keys = (), (), (), (), ()
    for tile in tl.static_range(TILES):
        b_q += (_load_turned(
            p_q + tile * BQ * stride, p_turn + tile * BQ * P, o_query, left - tile * BQ, stride, BQ, HALF, BH),)
        b_sum = b_sum + (tl.zeros([BQ, BP], tl.float32),)
        b_total = b_total + (tl.zeros([BQ], tl.float32),)
        b_top = b_top + (tl.full([BQ], float("-inf"), tl.float32),)
        if DROPOUT:
            o_row = chunk * (TILES * BQ) + tile * BQ + o_query
            b_keys = b_keys + (_row_keys(seed_low, seed_high, sequence, head, o_row),)
    p_k = k + first * stride + head * stride_head
    p_v = v + first * stride + head * stride_head
    p_turn = table + first * P
    for key in range(0, count, BK):
        b_k = _load_turned(p_k, p_turn, o_key, count - key, stride, BK, HALF, BH)
        b_v = _load_rows(p_v, o_key, count - key, stride, P, BP)
        n_sum, n_total, n_top = (), (), ()
        for tile in tl.static_range(TILES):
            b_score = _product(b_q[tile], tl.trans(b_k), tl.zeros([BQ, BK], tl.float32))
            if key + BK > count:
                b_score = tl.where((o_key < count - key)[None, :], b_score, float("-inf"))
            b_max = tl.maximum(b_top[tile], tl.max(b_score, 1) * scale)
            b_weight = tl.exp2(b_score * scale - b_max[:, None])
            b_shrink = tl.exp2(b_top[tile] - b_max)
            n_top = n_top + (b_max,)
            n_total = n_total + (b_total[tile] * b_shrink + tl.sum(b_weight, 1),)
            if DROPOUT:
                b_weight = tl.where(_kept(b_keys[tile][:, None], (key + o_key)[None, :], dropped), b_weight, 0.0)
            n_sum = n_sum + (_product(b_weight.to(b_v.dtype), b_v, b_sum[tile] * b_shrink[:, None]),)
        b_sum, b_total, b_top = n_sum, n_total, n_top
        p_k += BK * stride
        p_v += BK * stride
        p_turn += BK * P
    p_out = out + begin * stride_out + head * P
    p_statistic = statistic + head.to(tl.int64) * tokens + begin
    for tile in tl.static_range(TILES):
        b_out = b_sum[tile] * (dropout_scale / b_total[tile])[:, None]
        _store_rows(p_out + tile * BQ * stride_out, b_out, o_query, left - tile * BQ, stride_out, P, BP)
        o_row = tile * BQ + o_query
        tl.store(p_statistic + o_row, b_top[tile] + tl.log2(b_total[tile]), mask=o_row < left)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "dropped", "lower", "upper"])
def _backward_queries(
    q, k, v, table, cu, out, grad_out, statistic,  # as in `_forward`; grad_out contiguous
    delta,  # [H, T] fp32 out: sum of grad_out * out per row
    turned,  # [T, H, BP] out: q turned, for `_backward_keys`
    grad_q,  # [T, H, P] out, strides (stride_grad, stride_grad_head, 1)
    tokens, sequences, heads, chunks, lower, upper, stride, stride_head, stride_grad, stride_grad_head,
    scale, grad_scale, seed_low, seed_high, dropped, dropout_scale,
    P: tl.constexpr, HALF: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, DROPOUT: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One program: grad q of BQ queries of one sequence and head."""
    sequence, head, chunk, first = _place(cu, sequences, heads, chunks)
    if TAIL:
        if sequence == sequences:
            _zero_tail(grad_q + head * stride_grad_head, first, tokens, chunk, chunks, stride_grad, P, BP, BQ)
            return
    count = (tl.load(cu + sequence + 1) - first).to(tl.int32)
    if count <= lower or count > upper or chunk * BQ >= count:
        return
    o_query = tl.arange(0, BQ)
    o_key = tl.arange(0, BK)
    stride_out = heads * P
    begin = first + chunk * BQ
    left = count - chunk * BQ
    p_turn = table + begin * P
    b_q = _load_turned(q + begin * stride + head * stride_head, p_turn, o_query, left, stride, BQ, HALF, BH)
    b_go = _load_rows(grad_out + begin * stride_out + head * P, o_query, left, stride_out, P, BP)
    b_out = _load_rows(out + begin * stride_out + head * P, o_query, left, stride_out, P, BP)
    b_delta = tl.sum(b_go.to(tl.float32) * b_out.to(tl.float32), 1)
    _store_rows(turned + (begin * heads + head) * BP, b_q, o_query, left, heads * BP, BP, BP)
    row = head.to(tl.int64) * tokens + begin
    tl.store(delta + row + o_query, b_delta, mask=o_query < left)
    b_stat = tl.load(statistic + row + o_query, mask=o_query < left, other=float("inf"))
    b_row_key = o_query
    if DROPOUT:
        b_row_key = _row_keys(seed_low, seed_high, sequence, head, chunk * BQ + o_query)
    b_gq = tl.zeros([BQ, BP], tl.float32)
    p_k = k + first * stride + head * stride_head
    p_v = v + first * stride + head * stride_head
    p_key_turn = table + first * P
    for key in range(0, count, BK):
        b_k = _load_turned(p_k, p_key_turn, o_key, count - key, stride, BK, HALF, BH)
        b_v = _load_rows(p_v, o_key, count - key, stride, P, BP)
        b_score = _product(b_q, tl.trans(b_k), tl.zeros([BQ, BK], tl.float32))
        b_weight = tl.exp2(b_score * scale - b_stat[:, None])
        if key + BK > count:
            b_weight = tl.where((o_key < count - key)[None, :], b_weight, 0.0)
        b_grad = _product(b_go, tl.trans(b_v), tl.zeros([BQ, BK], tl.float32))
        if DROPOUT:
            kept = _kept(b_row_key[:, None], (key + o_key)[None, :], dropped)
            b_grad = tl.where(kept, b_grad * dropout_scale, 0.0)
        b_grad = (b_weight * (b_grad - b_delta[:, None])).to(b_v.dtype)
        b_gq = _product(b_grad, b_k, b_gq)
        p_k += BK * stride
        p_v += BK * stride
        p_key_turn += BK * P
    p_gq = grad_q + begin * stride_grad + head * stride_grad_head
    _store_turned_back(p_gq, p_turn, b_gq * grad_scale, o_query, left, stride_grad, BQ, HALF, BH)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "dropped", "lower", "upper"])
def _backward_keys(
    turned, k, v, table, cu, grad_out, statistic, delta,  # turned and delta as `_backward_queries` left them
    grad_k, grad_v,
    tokens, sequences, heads, chunks, lower, upper, stride, stride_head, stride_grad, stride_grad_head,
    scale, grad_scale, seed_low, seed_high, dropped, dropout_scale,
    P: tl.constexpr, HALF: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, DROPOUT: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One program: grad k and grad v of BK keys of one sequence and head."""
    sequence, head, chunk, first = _place(cu, sequences, heads, chunks)
    grad_head = head * stride_grad_head
    if TAIL:
        if sequence == sequences:
            _zero_tail(grad_k + grad_head, first, tokens, chunk, chunks, stride_grad, P, BP, BK)
            _zero_tail(grad_v + grad_head, first, tokens, chunk, chunks, stride_grad, P, BP, BK)
            return
    count = (tl.load(cu + sequence + 1) - first).to(tl.int32)
    if count <= lower or count > upper or chunk * BK >= count:
        return
    o_query = tl.arange(0, BQ)
    o_key = tl.arange(0, BK)
    stride_out = heads * P
    begin = first + chunk * BK
    left = count - chunk * BK
    p_key_turn = table + begin * P
    b_k = _load_turned(k + begin * stride + head * stride_head, p_key_turn, o_key, left, stride, BK, HALF, BH)
    b_v = _load_rows(v + begin * stride + head * stride_head, o_key, left, stride, P, BP)
    b_gk = tl.zeros([BK, BP], tl.float32)
    b_gv = tl.zeros([BK, BP], tl.float32)
    p_q = turned + (first * heads + head) * BP
    p_go = grad_out + first * stride_out + head * P
    p_stat = statistic + head.to(tl.int64) * tokens + first
    p_delta = delta + head.to(tl.int64) * tokens + first
    for query in range(0, count, BQ):
        b_q = _load_rows(p_q, o_query, count - query, heads * BP, BP, BP)
        b_go = _load_rows(p_go, o_query, count - query, stride_out, P, BP)
        b_stat = tl.load(p_stat + o_query, mask=o_query < count - query, other=float("inf"))
        b_delta = tl.load(p_delta + o_query, mask=o_query < count - query, other=0.0)
        b_score = _product(b_k, tl.trans(b_q), tl.zeros([BK, BQ], tl.float32))
        b_weight = tl.exp2(b_score * scale - b_stat[None, :])
        b_grad = _product(b_v, tl.trans(b_go), tl.zeros([BK, BQ], tl.float32))
        b_used = b_weight
        if DROPOUT:
            b_row_key = _row_keys(seed_low, seed_high, sequence, head, query + o_query)
            kept = _kept(b_row_key[None, :], (chunk * BK + o_key)[:, None], dropped)
            b_used = tl.where(kept, b_weight, 0.0)
            b_grad = tl.where(kept, b_grad * dropout_scale, 0.0)
        b_grad = (b_weight * (b_grad - b_delta[None, :])).to(b_v.dtype)
        b_gv = _product(b_used.to(b_v.dtype), b_go, b_gv)
        b_gk = _product(b_grad, b_q, b_gk)
        p_q += BQ * heads * BP
        p_go += BQ * stride_out
        p_stat += BQ
        p_delta += BQ
    p_gk = grad_k + begin * stride_grad + grad_head
    p_gv = grad_v + begin * stride_grad + grad_head
    _store_rows(p_gv, b_gv * dropout_scale, o_key, left, stride_grad, P, BP)
    _store_turned_back(p_gk, p_key_turn, b_gk * grad_scale, o_key, left, stride_grad, BK, HALF, BH)


def attention(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor, cu_tokens: Tensor, max_tokens: int, *, dropout: float, seed: int
) -> Tensor:
    """See `exlm_dist.kernels.attention.attention`. Head widths: multiples of 32 up to 128; fp32, bf16, fp16."""
    width = q.shape[-1]
    if width % 32 or not 32 <= width <= 128:
        raise ValueError(f"the attention kernels take head widths 32, 64, 96 and 128, not {width}; use backend 'reference'")
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the attention kernels take float32, bfloat16 and float16, not {q.dtype}")
    return _Attention.apply(q, k, v, angles, cu_tokens, max_tokens, dropout, seed)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, angles, cu_tokens, max_tokens, dropout, seed):
        q, k, v = _alike(q, k, v)
        call = _Call(q, _turns(angles), cu_tokens.contiguous(), max_tokens, dropout, seed)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        statistic = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
        for index, form in enumerate(call.forms):
            call.start(_forward, form, form.forward, index == 0, "queries", q=q, k=k, v=v, out=out, statistic=statistic)
        ctx.save_for_backward(q, k, v, out, statistic)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        q, k, v, out, statistic = ctx.saved_tensors
        call = ctx.call
        grad_q, grad_k, grad_v = torch.empty((3, *q.shape), dtype=q.dtype, device=q.device)
        read = {"k": k, "v": v, "grad_out": grad_out.contiguous(), "statistic": statistic}
        strides = {"stride_grad": grad_q.stride(0), "stride_grad_head": grad_q.stride(1)}
        delta = torch.empty_like(statistic)
        turned = torch.empty((*q.shape[:2], triton.next_power_of_2(call.width)), dtype=q.dtype, device=q.device)
        for index, form in enumerate(call.forms):
            shared = {**read, **strides, "grad_scale": call.width**-0.5, "delta": delta, "turned": turned}
            call.start(_backward_queries, form, form.queries, index == 0, "queries", q=q, out=out, grad_q=grad_q, **shared)
            call.start(_backward_keys, form, form.keys, index == 0, "keys", grad_k=grad_k, grad_v=grad_v, **shared)
        return grad_q, grad_k, grad_v, None, None, None, None, None


class _Call:
    """What forward and backward of one call share: sizes, dropout, the forms to launch."""

    def __init__(self, q: Tensor, table: Tensor, cu_tokens: Tensor, max_tokens: int, dropout: float, seed: int) -> None:
        self.tokens, self.heads, self.width = q.shape
        self.table, self.cu_tokens, self.max_tokens = table, cu_tokens, max_tokens
        self.strides = q.stride()
        self.dropped = round(dropout * 2**DROP_BITS)
        self.forms = forms(self.width, q.dtype.itemsize, max_tokens, self.dropped > 0, capability(q.device))
        self.seed = seed

    def start(self, kernel, form: Form, tiles, tail: bool, over: str, **arguments) -> None:
        """Launch `kernel` for the sequences whose lengths are in the form's range; the first form also zeroes the padding."""
        rows = tiles.queries * tiles.resident if over == "queries" else tiles.keys
        chunks = 1 if over == "all" else triton.cdiv(min(max(self.max_tokens, 1), form.upper), rows)
        sequences = len(self.cu_tokens) - 1
        half = self.width // 2
        arguments |= {
            "table": self.table, "cu": self.cu_tokens, "tokens": self.tokens, "sequences": sequences,
            "heads": self.heads, "chunks": chunks, "lower": form.lower, "upper": form.upper,
            "stride": self.strides[0], "stride_head": self.strides[1], "scale": self.width**-0.5 * LOG2_E,
            "seed_low": _signed(self.seed), "seed_high": _signed(self.seed >> 32), "dropped": self.dropped,
            "dropout_scale": 2**DROP_BITS / (2**DROP_BITS - self.dropped),
        }  # fmt: skip
        constants = {
            "P": self.width, "HALF": half, "BP": triton.next_power_of_2(self.width),
            "BH": triton.next_power_of_2(half), "BQ": tiles.queries, "BK": tiles.keys,
            "DROPOUT": self.dropped > 0, "TAIL": tail,
        }  # fmt: skip
        if "TILES" in kernel.arg_names:
            constants["TILES"] = tiles.resident
        grid = ((sequences + tail) * self.heads * chunks,)
        settings = {"warps": tiles.warps, "stages": tiles.stages, "registers": tiles.registers}
        launch(kernel, grid, arguments, constants, **settings)


def _signed(word: int) -> int:
    """The low 32 bits as a signed number, so that the kernel's argument has one type for every seed."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def _alike(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three with equal strides and contiguous heads: as they come if they are slices of one matrix, else copies."""
    if q.stride() == k.stride() == v.stride() and q.stride(2) == 1:
        return q, k, v
    return q.contiguous(), k.contiguous(), v.contiguous()


_latest: tuple[weakref.ref[Tensor], int, Tensor] | None = None


def _turns(angles: Tensor) -> Tensor:
    """Cosines and sines [T, P] of `angles`, kept until other angles come: all layers of a step share one table.

    While a CUDA graph is captured nothing is kept, so that a replay computes the table from the angles of then.
    """
    global _latest
    capturing = angles.is_cuda and torch.cuda.is_current_stream_capturing()
    latest = _latest
    if not capturing and latest is not None and latest[0]() is angles and latest[1] == angles._version:
        return latest[2]
    half = angles.shape[1]
    table = torch.empty((len(angles), 2 * half), dtype=torch.float32, device=angles.device)
    source = angles.detach().float()
    torch.cos(source, out=table[:, :half])
    torch.sin(source, out=table[:, half:])
    if not capturing:
        _latest = weakref.ref(angles), angles._version, table
    return table
