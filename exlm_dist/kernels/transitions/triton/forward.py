"""Forward kernels: the lse of each head, then the sum over the heads tile by tile."""

from __future__ import annotations

import triton
import triton.language as tl

from exlm_dist.kernels.transitions.triton.tiles import (
    LN2,
    LOWEST,
    after,
    allowed,
    load_rows,
    log_gates,
    prior_scores,
    scores,
    transition_tile,
)
from exlm_dist.kernels.transitions.triton.tiles import sequence as states_of

# Below this a sum of probabilities may miss terms that matter: 26 bits above the smallest normal number.
LEAST_SUM = tl.constexpr(2.0**-100)


@triton.jit(do_not_specialize=["rows"])
def normaliser_kernel(
    query, key, gate, cu_states, lse, base, scale, slope, lowest, rows,
    heads: tl.constexpr, width: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, PRIOR: tl.constexpr, STEP: tl.constexpr,
):
    """For ROWS states v: lse of one head in base 2 (log2 of the sum over u of 2^score), log2 of its gate minus that."""
    h = tl.program_id(1)
    first, length = states_of(cu_states, tl.program_id(2))
    row = tl.program_id(0) * ROWS
    o_v = row + tl.arange(0, ROWS)
    if row < length:
        b_query = load_rows(query + h * width, first + row, length - row, heads, width, ROWS, BLOCK)
        b_top = tl.full([ROWS], LOWEST, tl.float32)
        b_sum = tl.zeros([ROWS], tl.float32)
        start, stop = after(row, ROWS, length, GROUP)
        for column in range(start // COLUMNS * COLUMNS, stop, COLUMNS):
            o_u = column + tl.arange(0, COLUMNS)
            b_key = load_rows(key + h * width, first + column, length - column, heads, width, COLUMNS, BLOCK)
            b_prior = prior_scores(row, column, slope, lowest, PRIOR, STEP, ROWS, COLUMNS)
            b_score = tl.dot(b_query, tl.trans(b_key), b_prior, input_precision=PRECISION)
            if (GROUP > 0) | (column < row + ROWS) | (column + COLUMNS > length):
                b_score = tl.where(allowed(o_v, o_u, length, GROUP), b_score, float("-inf"))
            b_new = tl.maximum(b_top, tl.max(b_score, 1))
            b_part = tl.exp2(b_score * scale - (b_new * scale)[:, None])
            b_sum = b_sum * tl.exp2((b_top - b_new) * scale) + tl.sum(b_part, 1)
            b_top = b_new
        b_sum = tl.where(b_sum > 0, b_top * scale + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), 0.0)
        head = h.to(tl.int64) * rows + first
        tl.store(lse + head + o_v, b_sum, mask=o_v < length)
        b_gate = log_gates(gate, first + o_v, o_v < length, heads, HEADS)
        b_own = tl.sum(tl.where((tl.arange(0, HEADS) == h)[None, :], b_gate, 0.0), 1)
        tl.store(base + head + o_v, b_own - b_sum, mask=o_v < length)


@triton.jit(do_not_specialize=["side", "rows"])
def mixture_kernel(
    query, key, cu_states, base, out, scale, slope, lowest, side, rows,
    heads: tl.constexpr, width: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, PRIOR: tl.constexpr, STEP: tl.constexpr, ALIGN: tl.constexpr,
):
    """log E of a tile [ROWS, COLUMNS]: log of the sum over heads of gate times probability; -inf where not allowed."""
    b = tl.program_id(2).to(tl.int64)
    first, length = states_of(cu_states, b)
    row = tl.program_id(1) * ROWS
    column = tl.program_id(0) * COLUMNS
    start, stop = after(row, ROWS, length, GROUP)
    count = tl.where((column < stop) & (column + COLUMNS > start) & (row < length), heads, 0)
    b_prior = prior_scores(row, column, slope, lowest, PRIOR, STEP, ROWS, COLUMNS)
    b_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for h in range(0, count):
        b_score = scores(
            query, key, base, b_prior, first, row, column, length, h, scale, rows, heads, width, ROWS, COLUMNS, BLOCK,
            PRECISION,
        )
        b_sum += tl.exp2(b_score)
    m_transition = allowed(row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS), length, GROUP)
    b_out = tl.log2(b_sum)
    if tl.min(tl.where(m_transition, b_sum, 1.0)) < LEAST_SUM:  # then once more, relative to the largest so far
        b_top = tl.full([ROWS, COLUMNS], LOWEST, tl.float32)
        b_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
        for h in range(0, count):
            b_score = scores(
                query, key, base, b_prior, first, row, column, length, h, scale, rows, heads, width, ROWS, COLUMNS,
                BLOCK, PRECISION,
            )
            b_gap = tl.exp2(-tl.abs(b_score - b_top))
            b_sum = tl.where(b_score > b_top, b_sum * b_gap + 1.0, b_sum + b_gap)
            b_top = tl.maximum(b_score, b_top)
        b_out = b_top + tl.log2(b_sum)
    b_out = tl.where(m_transition, b_out * LN2, float("-inf"))
    start, o_transition, m_inside = transition_tile(b, row, column, side, ROWS, COLUMNS, ALIGN)
    tl.store(out + start + o_transition, b_out, mask=m_inside)
