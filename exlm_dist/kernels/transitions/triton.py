"""Triton kernels of the transition log-probabilities: tiles of the allowed triangle only, nothing of [L, L, H] stored.

Scores are kept in base 2. Forward: one kernel leaves the log-sum of each (state, head), a second adds the heads up
tile by tile. Backward: with share_h = p(head h | move v -> u) in [0, 1] and G the gradient of log E, the gradient of
a score is share_h G - p_h sum_u(share_h G); no probability is divided by, so none can underflow into a wrong gradient
(README.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from exlm_dist.kernels.launch import cdiv, launch, next_power_of_2
from exlm_dist.kernels.transitions import reference

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.0e30)


def transition_log_probs(
    query: Tensor, key: Tensor, gate: Tensor, cu_states: Tensor, max_states: int, *, group: int | None
) -> Tensor:
    """Dense (group None) or sparse (states per group) log E; see `exlm_dist.kernels.transitions`."""
    if query.dtype == torch.float64:
        return reference.transition_log_probs(query, key, gate, cu_states, max_states, group=group)
    return _Transitions.apply(query, key, gate, cu_states, max_states, group)


def uniform_log_probs(cu_states: Tensor, max_states: int) -> Tensor:
    """See `exlm_dist.kernels.transitions`: no parameters, made once per batch, the definition is enough."""
    return reference.uniform_log_probs(cu_states, max_states)


@triton.jit
def _allowed(o_v, o_u, length, GROUP: tl.constexpr):
    """[v, u]: may state v be followed by state u."""
    if GROUP == 0:
        m_order = o_v[:, None] < o_u[None, :]
    else:
        m_order = (o_v // GROUP + 1)[:, None] == (o_u // GROUP)[None, :]
    return m_order & ((o_v < length)[:, None] & (o_u < length)[None, :])


@triton.jit
def _after(first, count, length, GROUP: tl.constexpr):
    """Range of states that can follow one of first..first+count-1."""
    if GROUP == 0:
        start = first + 1
        stop = length
    else:
        start = (first // GROUP + 1) * GROUP
        stop = tl.minimum(((first + count - 1) // GROUP + 2) * GROUP, length)
    return start, stop


@triton.jit
def _before(first, count, GROUP: tl.constexpr):
    """Range of states that can come before one of first..first+count-1."""
    if GROUP == 0:
        start = first * 0
        stop = first + count - 1
    else:
        start = tl.maximum((first // GROUP - 1) * GROUP, 0)
        stop = ((first + count - 1) // GROUP) * GROUP
    return start, stop


@triton.jit
def _rows(pointer, first, o_row, length, h, heads: tl.constexpr, width: tl.constexpr, P_BLOCK: tl.constexpr):
    """[rows, P_BLOCK] of head h of packed [S, H, P]."""
    o_p = tl.arange(0, P_BLOCK)
    m_row = (o_row < length)[:, None]
    if P_BLOCK != width:
        m_row = m_row & (o_p < width)[None, :]
    return tl.load(pointer + ((first + o_row)[:, None] * heads + h) * width + o_p[None, :], mask=m_row, other=0.0)


@triton.jit
def normaliser_kernel(
    query, key, gate, cu_states, log_sum, log_gate, scale,
    heads: tl.constexpr, width: tl.constexpr, GROUP: tl.constexpr, P_BLOCK: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):
    """log2 of the sum over u of 2^score of one head, and log2 of the head's gate, for ROWS states v."""
    h = tl.program_id(1)
    first = tl.load(cu_states + tl.program_id(2))
    length = (tl.load(cu_states + tl.program_id(2) + 1) - first).to(tl.int32)
    o_v = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS < length:
        b_query = _rows(query, first, o_v, length, h, heads, width, P_BLOCK)
        b_top = tl.full([ROWS], LOWEST, tl.float32)
        b_sum = tl.zeros([ROWS], tl.float32)
        start, stop = _after(tl.program_id(0) * ROWS, ROWS, length, GROUP)
        for column in range(start // COLUMNS * COLUMNS, stop, COLUMNS):
            o_u = column + tl.arange(0, COLUMNS)
            b_key = _rows(key, first, o_u, length, h, heads, width, P_BLOCK)
            b_score = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION) * scale
            b_score = tl.where(_allowed(o_v, o_u, length, GROUP), b_score, float("-inf"))
            b_new = tl.maximum(b_top, tl.max(b_score, 1))
            b_sum = b_sum * tl.exp2(b_top - b_new) + tl.sum(tl.exp2(b_score - b_new[:, None]), 1)
            b_top = b_new
        o_out = (first + o_v) * heads + h
        b_sum = tl.where(b_sum > 0, b_top + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), 0.0)
        tl.store(log_sum + o_out, b_sum, mask=o_v < length)
        o_h = tl.arange(0, HEADS)
        m_gate = (o_v < length)[:, None] & (o_h < heads)[None, :]
        b_gate = tl.load(gate + (first + o_v)[:, None] * heads + o_h[None, :], mask=m_gate, other=float("-inf"))
        b_gate = tl.where((o_v < length)[:, None], b_gate.to(tl.float32) * LOG2E, 0.0)
        b_high = tl.max(b_gate, 1)
        b_total = b_high + tl.log2(tl.sum(tl.exp2(b_gate - b_high[:, None]), 1))
        b_own = tl.sum(tl.where((o_h == h)[None, :], b_gate, 0.0), 1)
        tl.store(log_gate + o_out, b_own - b_total, mask=o_v < length)


@triton.jit(do_not_specialize=["longest"])
def mixture_kernel(
    query, key, cu_states, log_sum, log_gate, out, scale, longest,
    heads: tl.constexpr, width: tl.constexpr, GROUP: tl.constexpr, P_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):
    """log E of a tile [ROWS, COLUMNS]: log-sum over the heads of gate times probability; -inf where not allowed."""
    b = tl.program_id(2).to(tl.int64)
    first = tl.load(cu_states + b)
    length = (tl.load(cu_states + b + 1) - first).to(tl.int32)
    o_v = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    o_u = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    start, stop = _after(tl.program_id(1) * ROWS, ROWS, length, GROUP)
    b_top = tl.full([ROWS, COLUMNS], LOWEST, tl.float32)
    b_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    column = tl.program_id(0) * COLUMNS
    used = (column < stop) & (column + COLUMNS > start) & (tl.program_id(1) * ROWS < length)
    for h in range(0, tl.where(used, heads, 0)):
        b_query = _rows(query, first, o_v, length, h, heads, width, P_BLOCK)
        b_key = _rows(key, first, o_u, length, h, heads, width, P_BLOCK)
        o_head = (first + o_v) * heads + h
        b_base = tl.load(log_gate + o_head, mask=o_v < length, other=0.0)
        b_base -= tl.load(log_sum + o_head, mask=o_v < length, other=0.0)
        b_score = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION) * scale + b_base[:, None]
        b_gap = tl.exp2(-tl.abs(b_score - b_top))
        b_sum = tl.where(b_score > b_top, b_sum * b_gap + 1.0, b_sum + b_gap)
        b_top = tl.maximum(b_score, b_top)
    b_out = (b_top + tl.log2(b_sum)) * LN2
    b_out = tl.where(_allowed(o_v, o_u, length, GROUP), b_out, float("-inf"))
    m_out = (o_v < longest)[:, None] & (o_u < longest)[None, :]
    tl.store(out + ((b * longest + o_v)[:, None] * longest + o_u[None, :]), b_out, mask=m_out)


@triton.jit
def _tile(out, grad_out, b, o_v, o_u, length, longest, GROUP: tl.constexpr):
    """(log2 E, gradient) of a tile of moves: 0 and 0 for a move that is not allowed or has no probability at all."""
    m_move = _allowed(o_v, o_u, length, GROUP)
    o_move = b * longest * longest + (o_v[:, None] * longest + o_u[None, :])
    b_log = tl.load(out + o_move, mask=m_move, other=float("-inf")) * LOG2E
    b_grad = tl.load(grad_out + o_move, mask=m_move, other=0.0)
    m_known = b_log > float("-inf")
    # Far above any score: the share of a move without probability is then 0 times its gradient, and 0 it is.
    return tl.where(m_known, b_log, -LOWEST), tl.where(m_known, b_grad, 0.0)


@triton.jit
def _score_gradient(b_score, b_log, b_grad, b_log_sum, b_log_gate, b_leaving, m_move):
    """share G - p leaving, [v, u], from the scores in base 2."""
    b_score -= b_log_sum[:, None]
    b_share = tl.exp2(b_score + b_log_gate[:, None] - b_log) * b_grad
    return b_share - tl.where(m_move, tl.exp2(b_score), 0.0) * b_leaving[:, None]


@triton.jit(do_not_specialize=["longest", "rows"])
def leaving_kernel(
    query, key, cu_states, log_sum, log_gate, out, grad_out, leaving, scale, longest, rows,
    heads: tl.constexpr, width: tl.constexpr, GROUP: tl.constexpr, P_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):
    """Sum over the u of a tile of share times gradient, [tiles of u, S, H]: all heads of a tile, read once."""
    b = tl.program_id(2).to(tl.int64)
    first = tl.load(cu_states + b)
    length = (tl.load(cu_states + b + 1) - first).to(tl.int32)
    o_v = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    o_u = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    start, stop = _after(tl.program_id(1) * ROWS, ROWS, length, GROUP)
    column = tl.program_id(0) * COLUMNS
    if (column < stop) & (column + COLUMNS > start) & (tl.program_id(1) * ROWS < length):
        b_log, b_grad = _tile(out, grad_out, b, o_v, o_u, length, longest, GROUP)
        for h in range(0, heads):
            b_query = _rows(query, first, o_v, length, h, heads, width, P_BLOCK)
            b_key = _rows(key, first, o_u, length, h, heads, width, P_BLOCK)
            o_head = (first + o_v) * heads + h
            b_base = tl.load(log_gate + o_head, mask=o_v < length, other=0.0)
            b_base -= tl.load(log_sum + o_head, mask=o_v < length, other=0.0)
            b_score = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION) * scale
            b_share = tl.exp2(b_score + b_base[:, None] - b_log) * b_grad
            o_out = tl.program_id(0).to(tl.int64) * rows * heads + o_head
            tl.store(leaving + o_out, tl.sum(b_share, 1), mask=o_v < length)


@triton.jit(do_not_specialize=["longest", "rows"])
def query_gradient_kernel(
    query, key, cu_states, log_sum, log_gate, out, grad_out, leaving, left, grad_query, scale, root, longest, rows,
    heads: tl.constexpr, width: tl.constexpr, GROUP: tl.constexpr, P_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):
    """Gradient of ROWS queries of one head, and `left`: the sum of `leaving` over its tiles."""
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    first = tl.load(cu_states + b)
    length = (tl.load(cu_states + b + 1) - first).to(tl.int32)
    o_v = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS < length:
        b_query = _rows(query, first, o_v, length, h, heads, width, P_BLOCK)
        o_head = (first + o_v) * heads + h
        b_log_sum = tl.load(log_sum + o_head, mask=o_v < length, other=0.0)
        b_log_gate = tl.load(log_gate + o_head, mask=o_v < length, other=0.0)
        start, stop = _after(tl.program_id(0) * ROWS, ROWS, length, GROUP)
        start = start // COLUMNS * COLUMNS
        b_leaving = tl.zeros([ROWS], tl.float32)
        p_leaving = leaving + ((start // COLUMNS).to(tl.int64) * rows * heads + o_head)
        for _ in range(start, stop, COLUMNS):
            b_leaving += tl.load(p_leaving, mask=o_v < length, other=0.0)
            p_leaving += rows * heads
        b_grad = tl.zeros([ROWS, P_BLOCK], tl.float32)
        for column in range(start, stop, COLUMNS):
            o_u = column + tl.arange(0, COLUMNS)
            b_key = _rows(key, first, o_u, length, h, heads, width, P_BLOCK)
            b_log, b_out = _tile(out, grad_out, b, o_v, o_u, length, longest, GROUP)
            b_score = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION) * scale
            m_move = _allowed(o_v, o_u, length, GROUP)
            b_score = _score_gradient(b_score, b_log, b_out, b_log_sum, b_log_gate, b_leaving, m_move)
            b_grad = tl.dot(b_score.to(b_key.dtype), b_key, b_grad, input_precision=PRECISION)
        b_grad *= root
        tl.store(left + o_head, b_leaving, mask=o_v < length)
        o_p = tl.arange(0, P_BLOCK)
        m_out = (o_v < length)[:, None] & (o_p < width)[None, :]
        tl.store(grad_query + o_head[:, None] * width + o_p[None, :], b_grad.to(b_query.dtype), mask=m_out)


@triton.jit(do_not_specialize=["longest", "rows"])
def key_gradient_kernel(
    query, key, cu_states, log_sum, log_gate, out, grad_out, left, grad_query, grad_key, grad_gate, scale, root,
    longest, rows,
    heads: tl.constexpr, width: tl.constexpr, GROUP: tl.constexpr, P_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, HEADS: tl.constexpr,
):
    """Gradient of COLUMNS keys of one head. The programs after the last head do the gates of as many states, those
    after the last sequence clear the rows that no sequence owns.
    """
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    first = tl.load(cu_states + b)
    column = tl.program_id(0) * COLUMNS
    if b == tl.num_programs(2) - 1:
        tail = tl.where(h < heads, (rows - first).to(tl.int32), 0)
        for row in range(column, tail, tl.num_programs(0) * COLUMNS):
            o_row = first + row + tl.arange(0, COLUMNS)
            _clear(grad_query, grad_key, grad_gate, o_row, o_row < rows, h, heads, width, COLUMNS, P_BLOCK)
    else:
        length = (tl.load(cu_states + b + 1) - first).to(tl.int32)
        o_u = column + tl.arange(0, COLUMNS)
        if h == heads:
            _gate_gradient(log_gate, left, grad_gate, first + o_u, o_u < length, heads, HEADS)
        elif column < length:
            b_key = _rows(key, first, o_u, length, h, heads, width, P_BLOCK)
            b_total = tl.zeros([COLUMNS, P_BLOCK], tl.float32)
            start, stop = _before(column, COLUMNS, GROUP)
            for row in range(start // ROWS * ROWS, tl.minimum(stop, length), ROWS):
                o_v = row + tl.arange(0, ROWS)
                b_query = _rows(query, first, o_v, length, h, heads, width, P_BLOCK)
                o_head = (first + o_v) * heads + h
                b_log_sum = tl.load(log_sum + o_head, mask=o_v < length, other=0.0)
                b_log_gate = tl.load(log_gate + o_head, mask=o_v < length, other=0.0)
                b_leaving = tl.load(left + o_head, mask=o_v < length, other=0.0)
                b_log, b_out = _tile(out, grad_out, b, o_v, o_u, length, longest, GROUP)
                b_score = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION) * scale
                m_move = _allowed(o_v, o_u, length, GROUP)
                b_score = _score_gradient(b_score, b_log, b_out, b_log_sum, b_log_gate, b_leaving, m_move)
                b_total = tl.dot(tl.trans(b_score.to(b_query.dtype)), b_query, b_total, input_precision=PRECISION)
            o_p = tl.arange(0, P_BLOCK)
            m_out = (o_u < length)[:, None] & (o_p < width)[None, :]
            o_out = ((first + o_u) * heads + h)[:, None] * width + o_p[None, :]
            tl.store(grad_key + o_out, (b_total * root).to(b_key.dtype), mask=m_out)


@triton.jit
def _gate_gradient(log_gate, left, grad_gate, o_row, m_row, heads: tl.constexpr, HEADS: tl.constexpr):
    """left_h - gate_h times the sum of `left` over the heads."""
    o_h = tl.arange(0, HEADS)
    o_out = o_row[:, None] * heads + o_h[None, :]
    m_out = m_row[:, None] & (o_h < heads)[None, :]
    b_left = tl.load(left + o_out, mask=m_out, other=0.0)
    b_gate = tl.exp2(tl.load(log_gate + o_out, mask=m_out, other=float("-inf")))
    b_grad = b_left - b_gate * tl.sum(b_left, 1)[:, None]
    tl.store(grad_gate + o_out, b_grad.to(grad_gate.dtype.element_ty), mask=m_out)


@triton.jit
def _clear(
    grad_query, grad_key, grad_gate, o_row, m_row, h, heads: tl.constexpr, width: tl.constexpr,
    ROWS: tl.constexpr, P_BLOCK: tl.constexpr,
):
    """Zero the gradients of one head: its queries, keys and gates."""
    o_p = tl.arange(0, P_BLOCK)
    o_out = (o_row * heads + h)[:, None] * width + o_p[None, :]
    b_none = tl.zeros([ROWS, P_BLOCK], grad_query.dtype.element_ty)
    tl.store(grad_query + o_out, b_none, mask=m_row[:, None] & (o_p < width)[None, :])
    tl.store(grad_key + o_out, b_none, mask=m_row[:, None] & (o_p < width)[None, :])
    tl.store(grad_gate + (o_row * heads + h), tl.zeros([ROWS], grad_gate.dtype.element_ty), mask=m_row)


class _Transitions(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, gate, cu_states, max_states, group):
        query, key, gate = query.contiguous(), key.contiguous(), gate.contiguous()
        _, heads, width = query.shape
        count = len(cu_states) - 1
        log_sum = torch.empty(gate.shape, dtype=torch.float32, device=gate.device)
        log_gate = torch.empty_like(log_sum)
        out = torch.empty((count, max_states, max_states), dtype=torch.float32, device=gate.device)
        packed = {"query": query, "key": key, "cu_states": cu_states, "log_sum": log_sum, "log_gate": log_gate}
        packed["scale"] = width**-0.5 * LOG2E.value
        settings, warps = _settings(query, max_states, group)
        launch(
            normaliser_kernel,
            (cdiv(max_states, settings["ROWS"]), heads, count),
            {**packed, "gate": gate},
            {**settings, "HEADS": next_power_of_2(heads)},
            warps=warps,
        )
        tiles = [cdiv(max_states, settings[side]) for side in ("COLUMNS", "ROWS")]
        launch(mixture_kernel, (*tiles, count), {**packed, "out": out, "longest": max_states}, settings, warps=warps)
        ctx.save_for_backward(query, key, gate, cu_states, log_sum, log_gate, out)
        ctx.settings = (max_states, group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, gate, cu_states, log_sum, log_gate, out = ctx.saved_tensors
        max_states, group = ctx.settings
        rows, heads, width = query.shape
        count = len(cu_states) - 1
        settings, warps = _settings(query, max_states, group)
        down, across = (cdiv(max_states, settings[side]) for side in ("ROWS", "COLUMNS"))
        leaving = torch.empty((across, rows, heads), dtype=torch.float32, device=query.device)
        left = torch.empty_like(log_sum)
        grad_query, grad_key, grad_gate = (torch.empty_like(tensor) for tensor in (query, key, gate))
        arguments = {
            "query": query, "key": key, "cu_states": cu_states, "log_sum": log_sum, "log_gate": log_gate, "out": out,
            "grad_out": grad_out.contiguous(), "scale": width**-0.5 * LOG2E.value, "longest": max_states,
        }  # fmt: skip
        all_heads = {**arguments, "leaving": leaving, "rows": rows}
        launch(leaving_kernel, (across, down, count), all_heads, settings, warps=warps)
        gradient = {**all_heads, "left": left, "grad_query": grad_query, "root": width**-0.5}
        launch(query_gradient_kernel, (down, heads, count), gradient, settings, warps=warps)
        gradient = {
            **arguments, "left": left, "grad_query": grad_query, "grad_key": grad_key, "grad_gate": grad_gate,
            "root": width**-0.5, "rows": rows,
        }  # fmt: skip
        constants = {**settings, "HEADS": next_power_of_2(heads)}
        launch(key_gradient_kernel, (across, heads + 1, count + 1), gradient, constants, warps=warps)
        return grad_query, grad_key, grad_gate, None, None, None


def _settings(query: Tensor, max_states: int, group: int | None) -> tuple[dict[str, object], int]:
    """Compile-time constants shared by the tiled kernels, and warps: the measured best (benchmarks/results)."""
    _, heads, width = query.shape
    precise = query.dtype == torch.float32
    block = max(16, next_power_of_2(width))
    if precise:
        rows = columns = 32 if block <= 32 else 16
    else:
        rows, columns = (32 if max_states <= 128 else 64), 32
    settings = {
        "heads": heads,
        "width": width,
        "GROUP": group or 0,
        "P_BLOCK": block,
        "ROWS": rows,
        "COLUMNS": columns,
        "PRECISION": "ieee" if precise else "tf32",
    }
    return settings, 8 if precise or block > 64 else 4
