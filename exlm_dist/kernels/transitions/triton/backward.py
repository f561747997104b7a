"""Backward kernels: row sums, then the gradients of queries, and of keys and gates.

Log E is -inf where a transition is not allowed; the incoming gradient may be anything there, NaN included.
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
    prior_scores,
    scores,
    store_rows,
    transition_tile,
)
from exlm_dist.kernels.transitions.triton.tiles import sequence as states_of


@triton.jit(do_not_specialize=["side", "rows"])
def row_sum_kernel(
    query, key, cu_states, base, out, grad_out, tile_sums, scale, slope, lowest, side, rows,
    heads: tl.constexpr, width: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, PRIOR: tl.constexpr, STEP: tl.constexpr, ALIGN: tl.constexpr,
):
    """Sum over the u of a tile of responsibility times gradient, [tiles of u, H, S]: all heads of a tile, read once."""
    b = tl.program_id(2).to(tl.int64)
    first, length = states_of(cu_states, b)
    row = tl.program_id(1) * ROWS
    column = tl.program_id(0) * COLUMNS
    o_v = row + tl.arange(0, ROWS)
    start, stop = after(row, ROWS, length, GROUP)
    if (column < stop) & (column + COLUMNS > start) & (row < length):
        origin, o_transition, m_transition = transition_tile(b, row, column, side, ROWS, COLUMNS, ALIGN)
        b_log = tl.load(out + origin + o_transition, mask=m_transition)
        b_grad = tl.load(grad_out + origin + o_transition, mask=m_transition)
        m_transition = m_transition & (b_log > float("-inf"))
        # Far above any score, so that the responsibility for a transition without probability is 0.
        b_log = tl.where(m_transition, b_log * LOG2E, -LOWEST)
        b_grad = tl.where(m_transition, b_grad, 0.0)
        b_prior = prior_scores(row, column, slope, lowest, PRIOR, STEP, ROWS, COLUMNS)
        p_out = tile_sums + (tl.program_id(0).to(tl.int64) * heads * rows + first)
        for h in range(0, heads):
            b_score = scores(
                query, key, base, b_prior, first, row, column, length, h, scale, rows, heads, width, ROWS, COLUMNS,
                BLOCK, PRECISION,
            )
            tl.store(p_out + o_v, tl.sum(tl.exp2(b_score - b_log) * b_grad, 1), mask=o_v < length)
            p_out += rows


@triton.jit
def _limit(count, SIZE: tl.constexpr):
    """inf for the first `count` states of a tile, then -inf."""
    return tl.where(tl.arange(0, SIZE) < count, float("inf"), float("-inf"))


@triton.jit
def _score_gradient(b_score, b_log, b_grad, b_lse, b_base, b_row_sum, scale, b_limit):
    """responsibility G - p row_sum, [v, u], from q.k; 0, whatever G is, for a transition that is not allowed, outside
    (-inf in `b_limit`) or without probability.
    """
    b_less = b_base[:, None] - b_log * LOG2E
    b_weighted = tl.exp2(b_score * scale + b_less) * b_grad
    b_part = tl.exp2(b_score * scale - b_lse[:, None]) * b_row_sum[:, None]
    # A zero unknown to the compiler: with a known one it would select after rounding, and round each element alone.
    return tl.where(b_less < b_limit, b_weighted - b_part, tl.minimum(scale, 0.0))


@triton.jit
def _add_row_sums(tile_sums, lse, base, row_sums, head, o_v, length, start, stop, step, COLUMNS: tl.constexpr):
    """Of states of one head: lse, base, and the sum over the tiles of `tile_sums`, which is stored in `row_sums`."""
    b_row_sum = tl.zeros_like(o_v).to(tl.float32)
    p_tile_sums = tile_sums + ((start // COLUMNS).to(tl.int64) * step + head)
    for _ in range(start, stop, COLUMNS):
        b_row_sum += tl.load(p_tile_sums + o_v, mask=o_v < length, other=0.0)
        p_tile_sums += step
    tl.store(row_sums + head + o_v, b_row_sum, mask=o_v < length)
    b_lse = tl.load(lse + head + o_v, mask=o_v < length, other=0.0)
    return b_lse, tl.load(base + head + o_v, mask=o_v < length, other=0.0), b_row_sum


@triton.jit(do_not_specialize=["side", "rows"])
def query_gradient_kernel(
    query, key, cu_states, lse, base, out, grad_out, tile_sums, row_sums, grad_query, scale, root, slope, lowest,
    side, rows,
    heads: tl.constexpr, width: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, PRIOR: tl.constexpr, STEP: tl.constexpr, ALIGN: tl.constexpr,
    EACH: tl.constexpr,
):
    """Gradient of ROWS queries of EACH heads (1 or 2), and `row_sums`: the sum over the tiles of `tile_sums`."""
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
        b_lse, b_base, b_row_sum = _add_row_sums(
            tile_sums, lse, base, row_sums, head, o_v, length, start, stop, step, COLUMNS
        )
        b_total = tl.zeros([ROWS, BLOCK], tl.float32)
        if EACH == 2:
            b_lse_2, b_base_2, b_row_sum_2 = _add_row_sums(
                tile_sums, lse, base, row_sums, head + rows, o_v, length, start, stop, step, COLUMNS
            )
            b_query_2 = load_rows(query + (h + 1) * width, first + row, length - row, heads, width, ROWS, BLOCK)
            b_total_2 = tl.zeros([ROWS, BLOCK], tl.float32)
        for column in range(start, stop, COLUMNS):
            origin, o_transition, m_transition = transition_tile(b, row, column, side, ROWS, COLUMNS, ALIGN)
            b_log = tl.load(out + origin + o_transition, mask=m_transition)
            b_grad = tl.load(grad_out + origin + o_transition, mask=m_transition)
            b_limit = _limit(length - column, COLUMNS)[None, :]
            b_key = load_rows(key + h * width, first + column, length - column, heads, width, COLUMNS, BLOCK)
            b_prior = prior_scores(row, column, slope, lowest, PRIOR, STEP, ROWS, COLUMNS)
            b_score = tl.dot(b_query, tl.trans(b_key), b_prior, input_precision=PRECISION)
            b_score = _score_gradient(b_score, b_log, b_grad, b_lse, b_base, b_row_sum, scale, b_limit)
            b_total = tl.dot(b_score.to(b_key.dtype), b_key, b_total, input_precision=PRECISION)
            if EACH == 2:
                b_key = load_rows(key + (h + 1) * width, first + column, length - column, heads, width, COLUMNS, BLOCK)
                b_score = tl.dot(b_query_2, tl.trans(b_key), b_prior, input_precision=PRECISION)
                b_score = _score_gradient(b_score, b_log, b_grad, b_lse_2, b_base_2, b_row_sum_2, scale, b_limit)
                b_total_2 = tl.dot(b_score.to(b_key.dtype), b_key, b_total_2, input_precision=PRECISION)
        grad_query += h * width
        store_rows(grad_query, first + row, length - row, b_total * root, heads, width, ROWS, BLOCK)
        if EACH == 2:
            store_rows(grad_query + width, first + row, length - row, b_total_2 * root, heads, width, ROWS, BLOCK)


@triton.jit
def _key_part(
    b_total, b_key, b_prior, b_log, b_grad, query, lse, base, row_sums, head, first, count, scale,
    heads: tl.constexpr, width: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):
    """The gradient `b_total` of keys of a head (that of `query`) plus what ROWS states v contribute."""
    o_v = tl.arange(0, ROWS)
    b_query = load_rows(query, first, count, heads, width, ROWS, BLOCK)
    b_lse = tl.load(lse + head + o_v, mask=o_v < count, other=0.0)
    b_base = tl.load(base + head + o_v, mask=o_v < count, other=0.0)
    b_row_sum = tl.load(row_sums + head + o_v, mask=o_v < count, other=0.0)
    b_score = tl.dot(b_query, tl.trans(b_key), b_prior, input_precision=PRECISION)
    b_limit = _limit(count, ROWS)[:, None]
    b_score = _score_gradient(b_score, b_log, b_grad, b_lse, b_base, b_row_sum, scale, b_limit)
    return tl.dot(tl.trans(b_score.to(b_query.dtype)), b_query, b_total, input_precision=PRECISION)


@triton.jit(do_not_specialize=["side", "rows"])
def key_gradient_kernel(
    query, key, gate, cu_states, lse, base, out, grad_out, row_sums, grad_query, grad_key, grad_gate, scale, root,
    slope, lowest, side, rows,
    heads: tl.constexpr, width: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, HEADS: tl.constexpr, PRIOR: tl.constexpr, STEP: tl.constexpr,
    ALIGN: tl.constexpr, EACH: tl.constexpr,
):
    """Gradient of COLUMNS keys of EACH heads (1 or 2). Programs past the last head do the gates of as many states;
    those past the last sequence zero the rows that no sequence owns.
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
            _gate_gradient(gate, row_sums, grad_gate, first + o_u, o_u < length, rows, heads, HEADS)
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
                origin, o_transition, m_transition = transition_tile(b, row, column, side, ROWS, COLUMNS, ALIGN)
                b_log = tl.load(out + origin + o_transition, mask=m_transition)
                b_grad = tl.load(grad_out + origin + o_transition, mask=m_transition)
                b_prior = prior_scores(row, column, slope, lowest, PRIOR, STEP, ROWS, COLUMNS)
                head = h.to(tl.int64) * rows + first + row
                b_total = _key_part(
                    b_total, b_key, b_prior, b_log, b_grad, query, lse, base, row_sums, head, first + row,
                    length - row, scale, heads, width, ROWS, BLOCK, PRECISION,
                )
                if EACH == 2:
                    b_total_2 = _key_part(
                        b_total_2, b_key_2, b_prior, b_log, b_grad, query + width, lse, base, row_sums, head + rows,
                        first + row, length - row, scale, heads, width, ROWS, BLOCK, PRECISION,
                    )
            grad_key += h * width
            store_rows(grad_key, first + column, length - column, b_total * root, heads, width, COLUMNS, BLOCK)
            if EACH == 2:
                grad_key += width
                store_rows(grad_key, first + column, length - column, b_total_2 * root, heads, width, COLUMNS, BLOCK)


@triton.jit
def _gate_gradient(gate, row_sums, grad_gate, o_row, m_row, rows, heads: tl.constexpr, HEADS: tl.constexpr):
    """row_sums_h - gate_h times the sum of `row_sums` over the heads."""
    o_h = tl.arange(0, HEADS)
    m_out = m_row[:, None] & (o_h < heads)[None, :]
    b_row_sum = tl.load(row_sums + (o_h.to(tl.int64)[None, :] * rows + o_row[:, None]), mask=m_out, other=0.0)
    b_gate = tl.exp2(log_gates(gate, o_row, m_row, heads, HEADS))
    b_grad = b_row_sum - b_gate * tl.sum(b_row_sum, 1)[:, None]
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
