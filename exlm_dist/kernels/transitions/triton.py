"""Triton kernels of the transition log-probabilities: tiles of the allowed triangle only, nothing of [L, L, H] stored.

Scores are kept in base 2. Forward: one kernel leaves the log-sum of each (state, head), a second adds the heads up
tile by tile. Backward: with share_h = p(head h | move v -> u) in [0, 1] and G the gradient of log E, the gradient of
a score is share_h G - p_h sum_u(share_h G); no probability is divided by, so none can underflow into a wrong gradient
(README.md).
"""

from __future__ import annotations

import math

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
# Where the sum of the heads' probabilities begins to miss terms that matter: 2^-100, 26 bits above the least number.
FAINT = tl.constexpr(7.888609052210118e-31)


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
    """[v, u]: may state v be followed by state u; one comparison, as a v past the end has no u before it."""
    if GROUP == 0:
        return o_v[:, None] < tl.where(o_u < length, o_u, -1)[None, :]
    else:
        return (o_v // GROUP + 1)[:, None] == tl.where(o_u < length, o_u // GROUP, -1)[None, :]


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
def _sequence(cu_states, b):
    """Where the states of a sequence begin (64 bits), and how many it has (32 bits)."""
    first = tl.load(cu_states + b)
    return first, (tl.load(cu_states + b + 1) - first).to(tl.int32)


@triton.jit
def _rows(pointer, place, count, heads: tl.constexpr, width: tl.constexpr, ROWS: tl.constexpr, P_BLOCK: tl.constexpr):
    """[ROWS, P_BLOCK] of a head (where `pointer` is) from state `place` of [S, H, P] on; zeros but for `count` rows."""
    o_row = tl.arange(0, ROWS)
    o_p = tl.arange(0, P_BLOCK)
    m_row = (o_row < count)[:, None]
    if P_BLOCK != width:
        m_row = m_row & (o_p < width)[None, :]
    pointer += place * (heads * width)
    return tl.load(pointer + (o_row[:, None] * (heads * width) + o_p[None, :]), mask=m_row, other=0.0)


@triton.jit(do_not_specialize=["rows"])
def normaliser_kernel(
    query, key, gate, cu_states, log_sum, base, scale, rows,
    heads: tl.constexpr, width: tl.constexpr, GROUP: tl.constexpr, P_BLOCK: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):
    """log2 of the sum over u of 2^score of one head, and log2 of the head's gate less that, for ROWS states v."""
    h = tl.program_id(1)
    first, length = _sequence(cu_states, tl.program_id(2))
    row = tl.program_id(0) * ROWS
    o_v = row + tl.arange(0, ROWS)
    if row < length:
        b_query = _rows(query + h * width, first + row, length - row, heads, width, ROWS, P_BLOCK)
        b_top = tl.full([ROWS], LOWEST, tl.float32)
        b_sum = tl.zeros([ROWS], tl.float32)
        start, stop = _after(row, ROWS, length, GROUP)
        for column in range(start // COLUMNS * COLUMNS, stop, COLUMNS):
            o_u = column + tl.arange(0, COLUMNS)
            b_key = _rows(key + h * width, first + column, length - column, heads, width, COLUMNS, P_BLOCK)
            b_score = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)
            if (GROUP > 0) | (column < row + ROWS) | (column + COLUMNS > length):
                b_score = tl.where(_allowed(o_v, o_u, length, GROUP), b_score, float("-inf"))
            b_new = tl.maximum(b_top, tl.max(b_score, 1))
            b_part = tl.exp2(b_score * scale - (b_new * scale)[:, None])
            b_sum = b_sum * tl.exp2((b_top - b_new) * scale) + tl.sum(b_part, 1)
            b_top = b_new
        b_sum = tl.where(b_sum > 0, b_top * scale + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), 0.0)
        head = h.to(tl.int64) * rows + first
        tl.store(log_sum + head + o_v, b_sum, mask=o_v < length)
        b_gate = _log_gates(gate, first + o_v, o_v < length, heads, HEADS)
        b_own = tl.sum(tl.where((tl.arange(0, HEADS) == h)[None, :], b_gate, 0.0), 1)
        tl.store(base + head + o_v, b_own - b_sum, mask=o_v < length)


@triton.jit
def _log_gates(gate, o_row, m_row, heads: tl.constexpr, HEADS: tl.constexpr):
    """log2 of the gates of states, [rows, HEADS]; -inf past the last head."""
    o_h = tl.arange(0, HEADS)
    m_gate = m_row[:, None] & (o_h < heads)[None, :]
    b_gate = tl.load(gate + (o_row[:, None] * heads + o_h[None, :]), mask=m_gate, other=0.0).to(tl.float32) * LOG2E
    b_gate = tl.where((o_h < heads)[None, :], b_gate, float("-inf"))
    b_high = tl.max(b_gate, 1)[:, None]
    return b_gate - (b_high + tl.log2(tl.sum(tl.exp2(b_gate - b_high), 1))[:, None])


@triton.jit
def _scores(
    query, key, base, first, row, column, length, h, scale, rows, heads: tl.constexpr, width: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, P_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):
    """log2 of gate times probability of head h, for a tile of moves."""
    b_query = _rows(query + h * width, first + row, length - row, heads, width, ROWS, P_BLOCK)
    b_key = _rows(key + h * width, first + column, length - column, heads, width, COLUMNS, P_BLOCK)
    o_v = row + tl.arange(0, ROWS)
    b_base = tl.load(base + (tl.cast(h, tl.int64) * rows + first) + o_v, mask=o_v < length, other=0.0)
    return tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION) * scale + b_base[:, None]


@triton.jit(do_not_specialize=["side", "rows"])
def mixture_kernel(
    query, key, cu_states, base, out, scale, side, rows,
    heads: tl.constexpr, width: tl.constexpr, GROUP: tl.constexpr, P_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):
    """log E of a tile [ROWS, COLUMNS]: log-sum over the heads of gate times probability; -inf where not allowed."""
    b = tl.program_id(2).to(tl.int64)
    first, length = _sequence(cu_states, b)
    row = tl.program_id(1) * ROWS
    column = tl.program_id(0) * COLUMNS
    o_v = row + tl.arange(0, ROWS)
    o_u = column + tl.arange(0, COLUMNS)
    start, stop = _after(row, ROWS, length, GROUP)
    used = (column < stop) & (column + COLUMNS > start) & (row < length)
    count = tl.where(used, heads, 0)
    b_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for h in range(0, count):
        b_score = _scores(
            query, key, base, first, row, column, length, h, scale, rows, heads, width, ROWS, COLUMNS, P_BLOCK, PRECISION
        )
        b_sum += tl.exp2(b_score)
    m_move = _allowed(o_v, o_u, length, GROUP)
    b_top = tl.zeros([ROWS, COLUMNS], tl.float32)
    if tl.min(tl.where(m_move, b_sum, 1.0)) < FAINT:  # again, beside the largest term: of others only the logarithm is left
        b_top += LOWEST
        b_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
        for h in range(0, count):
            b_score = _scores(
                query, key, base, first, row, column, length, h, scale, rows, heads, width, ROWS, COLUMNS, P_BLOCK,
                PRECISION,
            )
            b_gap = tl.exp2(-tl.abs(b_score - b_top))
            b_sum = tl.where(b_score > b_top, b_sum * b_gap + 1.0, b_sum + b_gap)
            b_top = tl.maximum(b_score, b_top)
    b_out = (b_top + tl.log2(b_sum)) * LN2
    b_out = tl.where(m_move, b_out, float("-inf"))
    o_tile, o_move, m_move = _moves(b, row, column, side, ROWS, COLUMNS, ALIGN)
    tl.store(out + o_tile + o_move, b_out, mask=m_move)


@triton.jit
def _moves(b, row, column, side, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr):
    """Start of a tile in [B, L, L], offsets from there, and which are inside; L is side * ALIGN, for wide words.

    The mask must not differ from element to element, as that of the allowed moves does: it would part the words.
    """
    longest = side * ALIGN
    o_v = tl.arange(0, ROWS)[:, None]
    o_u = tl.arange(0, COLUMNS)[None, :]
    o_tile = (b * longest + row) * longest + column
    return o_tile, o_v * longest + o_u, (o_v < longest - row) & (o_u < longest - column)


@triton.jit
def _limit(count, SIZE: tl.constexpr):
    """inf for the first `count` states of a tile, then -inf."""
    return tl.where(tl.arange(0, SIZE) < count, float("inf"), float("-inf"))


@triton.jit
def _score_gradient(b_score, b_log, b_grad, b_log_sum, b_base, b_leaving, scale, b_limit):
    """share G - p leaving, [v, u], from q.k; 0 for a move that is not allowed, not one's own (-inf in `b_limit`) or
    without probability, whatever its gradient is.
    """
    b_less = b_base[:, None] - b_log * LOG2E
    b_share = tl.exp2(b_score * scale + b_less) * b_grad
    b_part = tl.exp2(b_score * scale - b_log_sum[:, None]) * b_leaving[:, None]
    # A zero unknown to the compiler: with a known one it would choose after rounding, and round each number alone.
    return tl.where(b_less < b_limit, b_share - b_part, tl.minimum(scale, 0.0))


@triton.jit(do_not_specialize=["side", "rows"])
def leaving_kernel(
    query, key, cu_states, base, out, grad_out, leaving, scale, side, rows,
    heads: tl.constexpr, width: tl.constexpr, GROUP: tl.constexpr, P_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):
    """Sum over the u of a tile of share times gradient, [tiles of u, H, S]: all heads of a tile, read once."""
    b = tl.program_id(2).to(tl.int64)
    first, length = _sequence(cu_states, b)
    row = tl.program_id(1) * ROWS
    column = tl.program_id(0) * COLUMNS
    o_v = row + tl.arange(0, ROWS)
    start, stop = _after(row, ROWS, length, GROUP)
    if (column < stop) & (column + COLUMNS > start) & (row < length):
        o_tile, o_move, m_move = _moves(b, row, column, side, ROWS, COLUMNS, ALIGN)
        b_log = tl.load(out + o_tile + o_move, mask=m_move)
        b_grad = tl.load(grad_out + o_tile + o_move, mask=m_move)
        # Far above any score: the share of a move without probability is then 0 times its gradient, and 0 it is.
        m_move = m_move & (b_log > float("-inf"))
        b_log = tl.where(m_move, b_log * LOG2E, -LOWEST)
        b_grad = tl.where(m_move, b_grad, 0.0)
        p_out = leaving + (tl.program_id(0).to(tl.int64) * heads * rows + first)
        for h in range(0, heads):
            b_score = _scores(
                query, key, base, first, row, column, length, h, scale, rows, heads, width, ROWS, COLUMNS, P_BLOCK,
                PRECISION,
            )
            tl.store(p_out + o_v, tl.sum(tl.exp2(b_score - b_log) * b_grad, 1), mask=o_v < length)
            p_out += rows


@triton.jit(do_not_specialize=["side", "rows"])
def query_gradient_kernel(
    query, key, cu_states, log_sum, base, out, grad_out, leaving, left, grad_query, scale, root, side, rows,
    heads: tl.constexpr, width: tl.constexpr, GROUP: tl.constexpr, P_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):
    """Gradient of ROWS queries of one head, and `left`: the sum of `leaving` over its tiles."""
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    first, length = _sequence(cu_states, b)
    row = tl.program_id(0) * ROWS
    o_v = row + tl.arange(0, ROWS)
    if row < length:
        b_query = _rows(query + h * width, first + row, length - row, heads, width, ROWS, P_BLOCK)
        head = h.to(tl.int64) * rows + first
        b_log_sum = tl.load(log_sum + head + o_v, mask=o_v < length, other=0.0)
        b_base = tl.load(base + head + o_v, mask=o_v < length, other=0.0)
        start, stop = _after(row, ROWS, length, GROUP)
        start = start // COLUMNS * COLUMNS
        b_leaving = tl.zeros([ROWS], tl.float32)
        p_leaving = leaving + ((start // COLUMNS).to(tl.int64) * heads * rows + head)
        for _ in range(start, stop, COLUMNS):
            b_leaving += tl.load(p_leaving + o_v, mask=o_v < length, other=0.0)
            p_leaving += rows * heads
        b_grad = tl.zeros([ROWS, P_BLOCK], tl.float32)
        for column in range(start, stop, COLUMNS):
            b_key = _rows(key + h * width, first + column, length - column, heads, width, COLUMNS, P_BLOCK)
            o_tile, o_move, m_move = _moves(b, row, column, side, ROWS, COLUMNS, ALIGN)
            b_log = tl.load(out + o_tile + o_move, mask=m_move)
            b_out = tl.load(grad_out + o_tile + o_move, mask=m_move)
            b_score = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)
            b_limit = _limit(length - column, COLUMNS)[None, :]
            b_score = _score_gradient(b_score, b_log, b_out, b_log_sum, b_base, b_leaving, scale, b_limit)
            b_grad = tl.dot(b_score.to(b_key.dtype), b_key, b_grad, input_precision=PRECISION)
        b_grad *= root
        tl.store(left + head + o_v, b_leaving, mask=o_v < length)
        _store_rows(grad_query + h * width, first + row, length - row, b_grad, heads, width, ROWS, P_BLOCK)


@triton.jit
def _store_rows(
    pointer, place, count, b_value, heads: tl.constexpr, width: tl.constexpr, ROWS: tl.constexpr, P_BLOCK: tl.constexpr
):
    """The way back of `_rows`."""
    o_row = tl.arange(0, ROWS)
    o_p = tl.arange(0, P_BLOCK)
    m_out = (o_row < count)[:, None] & (o_p < width)[None, :]
    pointer += place * (heads * width)
    o_out = o_row[:, None] * (heads * width) + o_p[None, :]
    tl.store(pointer + o_out, b_value.to(pointer.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["side", "rows"])
def key_gradient_kernel(
    query, key, gate, cu_states, log_sum, base, out, grad_out, left, grad_query, grad_key, grad_gate, scale, root,
    side, rows,
    heads: tl.constexpr, width: tl.constexpr, GROUP: tl.constexpr, P_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, HEADS: tl.constexpr, ALIGN: tl.constexpr,
):
    """Gradient of COLUMNS keys of one head. The programs after the last head do the gates of as many states, those
    after the last sequence clear the rows that no sequence owns.
    """
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * COLUMNS
    if b == tl.num_programs(2) - 1:
        first = tl.load(cu_states + b)
        tail = tl.where(h < heads, (rows - first).to(tl.int32), 0)
        for row in range(column, tail, tl.num_programs(0) * COLUMNS):
            o_row = first + row + tl.arange(0, COLUMNS)
            _clear(grad_query, grad_key, grad_gate, o_row, o_row < rows, h, heads, width, COLUMNS, P_BLOCK)
    else:
        first, length = _sequence(cu_states, b)
        if h == heads:
            o_u = column + tl.arange(0, COLUMNS)
            _gate_gradient(gate, left, grad_gate, first + o_u, o_u < length, rows, heads, HEADS)
        elif column < length:
            b_key = _rows(key + h * width, first + column, length - column, heads, width, COLUMNS, P_BLOCK)
            b_total = tl.zeros([COLUMNS, P_BLOCK], tl.float32)
            start, stop = _before(column, COLUMNS, GROUP)
            for row in range(start // ROWS * ROWS, tl.minimum(stop, length), ROWS):
                b_query = _rows(query + h * width, first + row, length - row, heads, width, ROWS, P_BLOCK)
                head = h.to(tl.int64) * rows + first + row
                o_v = tl.arange(0, ROWS)
                b_log_sum = tl.load(log_sum + head + o_v, mask=o_v < length - row, other=0.0)
                b_base = tl.load(base + head + o_v, mask=o_v < length - row, other=0.0)
                b_leaving = tl.load(left + head + o_v, mask=o_v < length - row, other=0.0)
                o_tile, o_move, m_move = _moves(b, row, column, side, ROWS, COLUMNS, ALIGN)
                b_log = tl.load(out + o_tile + o_move, mask=m_move)
                b_out = tl.load(grad_out + o_tile + o_move, mask=m_move)
                b_score = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)
                b_limit = _limit(length - row, ROWS)[:, None]
                b_score = _score_gradient(b_score, b_log, b_out, b_log_sum, b_base, b_leaving, scale, b_limit)
                b_total = tl.dot(tl.trans(b_score.to(b_query.dtype)), b_query, b_total, input_precision=PRECISION)
            b_total *= root
            _store_rows(grad_key + h * width, first + column, length - column, b_total, heads, width, COLUMNS, P_BLOCK)


@triton.jit
def _gate_gradient(gate, left, grad_gate, o_row, m_row, rows, heads: tl.constexpr, HEADS: tl.constexpr):
    """left_h - gate_h times the sum of `left` over the heads."""
    o_h = tl.arange(0, HEADS)
    m_out = m_row[:, None] & (o_h < heads)[None, :]
    b_left = tl.load(left + (o_h.to(tl.int64)[None, :] * rows + o_row[:, None]), mask=m_out, other=0.0)
    b_gate = tl.exp2(_log_gates(gate, o_row, m_row, heads, HEADS))
    b_grad = b_left - b_gate * tl.sum(b_left, 1)[:, None]
    tl.store(grad_gate + (o_row[:, None] * heads + o_h[None, :]), b_grad.to(grad_gate.dtype.element_ty), mask=m_out)


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
        rows, heads, width = query.shape
        count = len(cu_states) - 1
        log_sum = torch.empty((heads, rows), dtype=torch.float32, device=gate.device)
        base = torch.empty_like(log_sum)
        out = torch.empty((count, max_states, max_states), dtype=torch.float32, device=gate.device)
        settings, align, warps = _settings(query, max_states, group)
        packed = {
            "query": query, "key": key, "cu_states": cu_states, "base": base, "scale": width**-0.5 * LOG2E.value,
            "rows": rows,
        }  # fmt: skip
        grid = (cdiv(max_states, settings["ROWS"]), heads, count)
        states = {**packed, "gate": gate, "log_sum": log_sum}
        launch(normaliser_kernel, grid, states, {**settings, "HEADS": next_power_of_2(heads)}, warps=warps)
        grid = (cdiv(max_states, settings["COLUMNS"]), grid[0], count)
        moves = {**packed, "out": out, "side": max_states // align}
        launch(mixture_kernel, grid, moves, {**settings, "ALIGN": align}, warps=warps)
        ctx.save_for_backward(query, key, gate, cu_states, log_sum, base, out)
        ctx.settings = (max_states, group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, gate, cu_states, log_sum, base, out = ctx.saved_tensors
        max_states, group = ctx.settings
        rows, heads, width = query.shape
        count = len(cu_states) - 1
        settings, align, warps = _settings(query, max_states, group)
        constants = {**settings, "ALIGN": align}
        down, across = (cdiv(max_states, settings[side]) for side in ("ROWS", "COLUMNS"))
        leaving = torch.empty((across, heads, rows), dtype=torch.float32, device=query.device)
        left = torch.empty_like(log_sum)
        grad_query, grad_key, grad_gate = (torch.empty_like(tensor) for tensor in (query, key, gate))
        arguments = {
            "query": query, "key": key, "cu_states": cu_states, "base": base, "out": out,
            "grad_out": grad_out.contiguous(), "scale": width**-0.5 * LOG2E.value, "side": max_states // align,
            "rows": rows,
        }  # fmt: skip
        launch(leaving_kernel, (across, down, count), {**arguments, "leaving": leaving}, constants, warps=warps)
        arguments |= {"log_sum": log_sum, "left": left, "grad_query": grad_query, "root": width**-0.5}
        launch(query_gradient_kernel, (down, heads, count), {**arguments, "leaving": leaving}, constants, warps=warps)
        arguments |= {"gate": gate, "grad_key": grad_key, "grad_gate": grad_gate}
        constants = {**constants, "HEADS": next_power_of_2(heads)}
        launch(key_gradient_kernel, (across, heads + 1, count + 1), arguments, constants, warps=warps)
        return grad_query, grad_key, grad_gate, None, None, None


def _settings(query: Tensor, max_states: int, group: int | None) -> tuple[dict[str, object], int, int]:
    """Compile-time constants of the tiled kernels and warps, the measured best (benchmarks/results); between them how
    many words of a row of moves can be read together.
    """
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
    return settings, math.gcd(max_states, 4), 8 if precise or block > 64 else 4
