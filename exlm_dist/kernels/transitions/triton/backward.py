"""Backward kernels: sums of each row, then the gradients of queries, and of keys and gates.

Log E is -inf where a move is not allowed; the gradient that comes in may be anything there, NaN included.
"""

from __future__ import annotations

import triton
import triton.language as tl

from exlm_dist.kernels.transitions.triton.tiles import (
    LOG2E,
    LOWEST,
    after,
    before,
    load_rows,
    log_gates,
    moves,
    scores,
    store_rows,
)
from exlm_dist.kernels.transitions.triton.tiles import sequence as states_of


@triton.jit(do_not_specialize=["side", "rows"])
def leaving_kernel(
    query, key, cu_states, base, out, grad_out, leaving, scale, side, rows,
    heads: tl.constexpr, width: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):
    """Sum over the u of a tile of share times gradient, [tiles of u, H, S]: all heads of a tile, read once."""
    b = tl.program_id(2).to(tl.int64)
    first, length = states_of(cu_states, b)
    row = tl.program_id(1) * ROWS
    column = tl.program_id(0) * COLUMNS
    o_v = row + tl.arange(0, ROWS)
    start, stop = after(row, ROWS, length, GROUP)
    if (column < stop) & (column + COLUMNS > start) & (row < length):
        place, o_move, m_move = moves(b, row, column, side, ROWS, COLUMNS, ALIGN)
        b_log = tl.load(out + place + o_move, mask=m_move)
        b_grad = tl.load(grad_out + place + o_move, mask=m_move)
        m_move = m_move & (b_log > float("-inf"))
        # Far above any score: the share of a move without probability is then 0 times its gradient, and 0 it is.
        b_log = tl.where(m_move, b_log * LOG2E, -LOWEST)
        b_grad = tl.where(m_move, b_grad, 0.0)
        p_out = leaving + (tl.program_id(0).to(tl.int64) * heads * rows + first)
        for h in range(0, heads):
            b_score = scores(
                query, key, base, first, row, column, length, h, scale, rows, heads, width, ROWS, COLUMNS, BLOCK,
                PRECISION,
            )
            tl.store(p_out + o_v, tl.sum(tl.exp2(b_score - b_log) * b_grad, 1), mask=o_v < length)
            p_out += rows


@triton.jit
def _limit(count, SIZE: tl.constexpr):
    """inf for the first `count` states of a tile, then -inf."""
    return tl.where(tl.arange(0, SIZE) < count, float("inf"), float("-inf"))


@triton.jit
def _score_gradient(b_score, b_log, b_grad, b_log_sum, b_base, b_left, scale, b_limit):
    """share G - p left, [v, u], from q.k; 0 for a move that is not allowed, outside (-inf in `b_limit`) or without
    probability, whatever its gradient is.
    """
    b_less = b_base[:, None] - b_log * LOG2E
    b_share = tl.exp2(b_score * scale + b_less) * b_grad
    b_part = tl.exp2(b_score * scale - b_log_sum[:, None]) * b_left[:, None]
    # A zero unknown to the compiler: with a known one it would choose after rounding, and round each number alone.
    return tl.where(b_less < b_limit, b_share - b_part, tl.minimum(scale, 0.0))


@triton.jit
def _add_row_sums(leaving, log_sum, base, left, head, o_v, length, start, stop, step, COLUMNS: tl.constexpr):
    """Of states of one head: log-sum, base, and the sum of `leaving`, which is written to `left`."""
    b_left = tl.zeros_like(o_v).to(tl.float32)
    p_leaving = leaving + ((start // COLUMNS).to(tl.int64) * step + head)
    for _ in range(start, stop, COLUMNS):
        b_left += tl.load(p_leaving + o_v, mask=o_v < length, other=0.0)
        p_leaving += step
    tl.store(left + head + o_v, b_left, mask=o_v < length)
    b_log_sum = tl.load(log_sum + head + o_v, mask=o_v < length, other=0.0)
    return b_log_sum, tl.load(base + head + o_v, mask=o_v < length, other=0.0), b_left


@triton.jit(do_not_specialize=["side", "rows"])
def query_gradient_kernel(
    query, key, cu_states, log_sum, base, out, grad_out, leaving, left, grad_query, scale, root, side, rows,
    heads: tl.constexpr, width: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr, EACH: tl.constexpr,
):
    """Gradient of ROWS queries of EACH heads (1 or 2), and `left`: the sum of `leaving` over its tiles."""
    h = tl.program_id(1) * EACH
    b = tl.program_id(2).to(tl.int64)
    first, length = states_of(cu_states, b)
    row = tl.program_id(0) * ROWS
    o_v = row + tl.arange(0, ROWS)
    if row < length:
        start, stop = after(row, ROWS, length, GROUP)
        start = start // COLUMNS * COLUMNS
        step = tl.cast(rows, tl.int64) * heads
        b_query = load_rows(query + h * width, first + row, length - row, heads, width, ROWS, BLOCK)
        head = h.to(tl.int64) * rows + first
        b_log_sum, b_base, b_left = _add_row_sums(
            leaving, log_sum, base, left, head, o_v, length, start, stop, step, COLUMNS
        )
        b_total = tl.zeros([ROWS, BLOCK], tl.float32)
        if EACH == 2:
            b_log_sum_2, b_base_2, b_left_2 = _add_row_sums(
                leaving, log_sum, base, left, head + rows, o_v, length, start, stop, step, COLUMNS
            )
            b_query_2 = load_rows(query + (h + 1) * width, first + row, length - row, heads, width, ROWS, BLOCK)
            b_total_2 = tl.zeros([ROWS, BLOCK], tl.float32)
        for column in range(start, stop, COLUMNS):
            place, o_move, m_move = moves(b, row, column, side, ROWS, COLUMNS, ALIGN)
            b_log = tl.load(out + place + o_move, mask=m_move)
            b_grad = tl.load(grad_out + place + o_move, mask=m_move)
            b_limit = _limit(length - column, COLUMNS)[None, :]
            b_key = load_rows(key + h * width, first + column, length - column, heads, width, COLUMNS, BLOCK)
            b_score = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)
            b_score = _score_gradient(b_score, b_log, b_grad, b_log_sum, b_base, b_left, scale, b_limit)
            b_total = tl.dot(b_score.to(b_key.dtype), b_key, b_total, input_precision=PRECISION)
            if EACH == 2:
                b_key = load_rows(key + (h + 1) * width, first + column, length - column, heads, width, COLUMNS, BLOCK)
                b_score = tl.dot(b_query_2, tl.trans(b_key), input_precision=PRECISION)
                b_score = _score_gradient(b_score, b_log, b_grad, b_log_sum_2, b_base_2, b_left_2, scale, b_limit)
                b_total_2 = tl.dot(b_score.to(b_key.dtype), b_key, b_total_2, input_precision=PRECISION)
        grad_query += h * width
        store_rows(grad_query, first + row, length - row, b_total * root, heads, width, ROWS, BLOCK)
        if EACH == 2:
            store_rows(grad_query + width, first + row, length - row, b_total_2 * root, heads, width, ROWS, BLOCK)


@triton.jit
def _key_part(
    b_total, b_key, b_log, b_grad, query, log_sum, base, left, head, place, count, scale, heads: tl.constexpr,
    width: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):
    """The gradient `b_total` of keys of a head (where `query` is) with what ROWS states v add to it."""
    o_v = tl.arange(0, ROWS)
    b_query = load_rows(query, place, count, heads, width, ROWS, BLOCK)
    b_log_sum = tl.load(log_sum + head + o_v, mask=o_v < count, other=0.0)
    b_base = tl.load(base + head + o_v, mask=o_v < count, other=0.0)
    b_left = tl.load(left + head + o_v, mask=o_v < count, other=0.0)
    b_score = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)
    b_limit = _limit(count, ROWS)[:, None]
    b_score = _score_gradient(b_score, b_log, b_grad, b_log_sum, b_base, b_left, scale, b_limit)
    return tl.dot(tl.trans(b_score.to(b_query.dtype)), b_query, b_total, input_precision=PRECISION)


@triton.jit(do_not_specialize=["side", "rows"])
def key_gradient_kernel(
    query, key, gate, cu_states, log_sum, base, out, grad_out, left, grad_query, grad_key, grad_gate, scale, root,
    side, rows,
    heads: tl.constexpr, width: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, HEADS: tl.constexpr, ALIGN: tl.constexpr, EACH: tl.constexpr,
):
    """Gradient of COLUMNS keys of EACH heads (1 or 2). The programs after the last head do the gates of as many states,
    those after the last sequence clear the rows that no sequence owns.
    """
    h = tl.program_id(1) * EACH
    b = tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * COLUMNS
    if b == tl.num_programs(2) - 1:
        first = tl.load(cu_states + b)
        tail = tl.where(h < heads, (rows - first).to(tl.int32), 0)
        for row in range(column, tail, tl.num_programs(0) * COLUMNS):
            o_row = first + row + tl.arange(0, COLUMNS)
            for more in tl.static_range(EACH):
                _clear(grad_query, grad_key, grad_gate, o_row, o_row < rows, h + more, heads, width, COLUMNS, BLOCK)
    else:
        first, length = states_of(cu_states, b)
        if h == heads:
            o_u = column + tl.arange(0, COLUMNS)
            _gate_gradient(gate, left, grad_gate, first + o_u, o_u < length, rows, heads, HEADS)
        elif column < length:
            query += h * width
            key += h * width
            b_key = load_rows(key, first + column, length - column, heads, width, COLUMNS, BLOCK)
            b_total = tl.zeros([COLUMNS, BLOCK], tl.float32)
            if EACH == 2:
                b_key_2 = load_rows(key + width, first + column, length - column, heads, width, COLUMNS, BLOCK)
                b_total_2 = tl.zeros([COLUMNS, BLOCK], tl.float32)
            start, stop = before(column, COLUMNS, GROUP)
            for row in range(start // ROWS * ROWS, tl.minimum(stop, length), ROWS):
                place, o_move, m_move = moves(b, row, column, side, ROWS, COLUMNS, ALIGN)
                b_log = tl.load(out + place + o_move, mask=m_move)
                b_grad = tl.load(grad_out + place + o_move, mask=m_move)
                head = h.to(tl.int64) * rows + first + row
                b_total = _key_part(
                    b_total, b_key, b_log, b_grad, query, log_sum, base, left, head, first + row, length - row, scale,
                    heads, width, ROWS, BLOCK, PRECISION,
                )
                if EACH == 2:
                    b_total_2 = _key_part(
                        b_total_2, b_key_2, b_log, b_grad, query + width, log_sum, base, left, head + rows, first + row,
                        length - row, scale, heads, width, ROWS, BLOCK, PRECISION,
                    )
            grad_key += h * width
            store_rows(grad_key, first + column, length - column, b_total * root, heads, width, COLUMNS, BLOCK)
            if EACH == 2:
                grad_key += width
                store_rows(grad_key, first + column, length - column, b_total_2 * root, heads, width, COLUMNS, BLOCK)


@triton.jit
def _gate_gradient(gate, left, grad_gate, o_row, m_row, rows, heads: tl.constexpr, HEADS: tl.constexpr):
    """left_h - gate_h times the sum of `left` over the heads."""
    o_h = tl.arange(0, HEADS)
    m_out = m_row[:, None] & (o_h < heads)[None, :]
    b_left = tl.load(left + (o_h.to(tl.int64)[None, :] * rows + o_row[:, None]), mask=m_out, other=0.0)
    b_gate = tl.exp2(log_gates(gate, o_row, m_row, heads, HEADS))
    b_grad = b_left - b_gate * tl.sum(b_left, 1)[:, None]
    tl.store(grad_gate + (o_row[:, None] * heads + o_h[None, :]), b_grad.to(grad_gate.dtype.element_ty), mask=m_out)


@triton.jit
def _clear(
    grad_query, grad_key, grad_gate, o_row, m_row, h, heads: tl.constexpr, width: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Zero the gradients of one head: its queries, keys and gates."""
    o_p = tl.arange(0, BLOCK)
    o_out = (o_row * heads + h)[:, None] * width + o_p[None, :]
    b_none = tl.zeros([ROWS, BLOCK], grad_query.dtype.element_ty)
    tl.store(grad_query + o_out, b_none, mask=m_row[:, None] & (o_p < width)[None, :])
    tl.store(grad_key + o_out, b_none, mask=m_row[:, None] & (o_p < width)[None, :])
    tl.store(grad_gate + (o_row * heads + h), tl.zeros([ROWS], grad_gate.dtype.element_ty), mask=m_row)
