"""The recursions in the probability domain: blocks of states, matrix products between them, row by row inside.

A row i of alpha over a block of states is stored as values <= 4 times two to a whole `scale`, so offsets are exact and
only differences of neighbours are rounded. What comes into a block from all earlier blocks is one matrix product over all
rows; only moves inside the block, which stay in registers, are taken row by row. alpha and beta run side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_REST = tl.constexpr(1.9259629911266175e-8)  # log2(e) less its fp32 value
LN2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(-1.0e30)  # scale of a row without any path
SHIFT = tl.constexpr(60.0)  # moves are held times 2^60, so that fp32 reaches down to exp(-128)
FAINT = tl.constexpr(-185.0)  # log2 of a move that fp32 cannot hold with that shift
SMALLEST = tl.constexpr(1.0e-37)


@triton.jit
def split(x):
    """Whole and fractional part of x log2(e), the fraction exact to fp32 however large x is."""
    high = x * LOG2E
    whole = tl.floor(high)
    return whole, (high - whole) + (tl.fma(x, LOG2E, -high) + x * LOG2E_REST)


@triton.jit
def _emit(b_total, scale, b_match, b_inside):
    """total 2^scale e^match as (values, scale) with a largest value between 1 and 4."""
    b_some = b_inside & (b_total > SMALLEST) & (b_match > float("-inf"))
    b_whole, b_part = split(tl.where(b_some, b_match, 0.0))
    b_log = tl.log2(tl.where(b_some, b_total, 1.0))
    b_carry = tl.floor(b_log)
    b_whole = tl.where(b_some, b_whole + b_carry, NEVER)
    top = tl.max(b_whole, 0)
    b_values = tl.where(b_some, tl.exp2((b_whole - top) + (b_part + (b_log - b_carry))), 0.0)
    return b_values, tl.where(top > NEVER, scale + top, NEVER)


@triton.jit
def _moves(moves, o_v, o_u, length, states):
    """Probabilities [v, u] of moves times 2^SHIFT, 0 where not allowed; and whether one is too faint for that."""
    m_move = (o_v[:, None] < o_u[None, :]) & (o_u < length)[None, :]
    b_log = tl.load(moves + o_v[:, None] * states + o_u[None, :], mask=m_move, other=float("-inf")) * LOG2E
    faint = tl.max(tl.max(((b_log > float("-inf")) & (b_log < FAINT)).to(tl.int32), 1), 0)
    return tl.exp2(b_log + SHIFT), faint


@triton.jit
def _arrivals(
    moves, values, scales, k, other, stop_block, o_i, m_i, n, length, states, blocks,
    FORWARD: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):
    """[ROWS, BLOCK] of what comes into block k from blocks other..stop_block-1, with its scale per row; and `faint`."""
    o_k = k * BLOCK + tl.arange(0, BLOCK)
    o_from = o_i - 1 if FORWARD else o_i + 1
    b_total = tl.zeros([ROWS, BLOCK], tl.float32)
    b_scale = tl.full([ROWS], NEVER, tl.float32)
    faint = 0
    for j in range(other, stop_block):
        m_from = m_i & (o_from >= tl.maximum(j * BLOCK - (length - n), 0)) & (o_from < tl.minimum((j + 1) * BLOCK, n))
        b_came = tl.load(scales + o_from * blocks + j, mask=m_from, other=NEVER)
        b_new = tl.maximum(b_scale, b_came - SHIFT)
        b_total *= tl.exp2(b_scale - b_new)[:, None]
        b_factor = tl.exp2((b_came - SHIFT) - b_new)
        for first in range(j * BLOCK, (j + 1) * BLOCK, PART):
            o_p = first + tl.arange(0, PART)
            b_values = tl.load(
                values + o_from[:, None].to(tl.int64) * states + o_p[None, :],
                mask=m_from[:, None] & (o_p < length)[None, :], other=0.0,
            ) * b_factor[:, None]
            if FORWARD:
                b_move, weak = _moves(moves, o_p, o_k, length, states)
            else:
                b_move, weak = _moves(moves, o_k, o_p, length, states)
                b_move = tl.trans(b_move)
            b_total = tl.dot(b_values, b_move, b_total, input_precision=PRECISION)
            faint = tl.maximum(faint, weak)
        b_scale = b_new
    return b_total, b_scale, faint


@triton.jit
def _recursion(
    match, moves, values, scales, tails, tail_scales, n, length, states, blocks, ends, first_weight,
    FORWARD: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):
    """alpha (FORWARD), or beta times the match in `values` and beta itself in `tails`; whether a move was too faint."""
    count = tl.cdiv(length, BLOCK)
    slack = length - n
    faint = 0
    for turn in range(0, count):
        k = turn if FORWARD else count - 1 - turn
        start = tl.maximum(k * BLOCK - slack, 0)
        stop = tl.minimum((k + 1) * BLOCK, n)
        o_k = k * BLOCK + tl.arange(0, BLOCK)
        if turn > 0:
            for first in range(start, stop, ROWS):
                o_i = first + tl.arange(0, ROWS)
                b_total, b_scale, weak = _arrivals(
                    moves, values, scales, k, 0 if FORWARD else k + 1, k if FORWARD else count, o_i, o_i < stop,
                    n, length, states, blocks, FORWARD, BLOCK, PART, ROWS, PRECISION,
                )
                faint = tl.maximum(faint, weak)
                m_out = (o_i < stop)[:, None] & (o_k < length)[None, :]
                tl.store(values + o_i[:, None].to(tl.int64) * states + o_k[None, :], b_total, mask=m_out)
                tl.store(scales + o_i * blocks + k, b_scale, mask=o_i < stop)
        tl.debug_barrier()
        b_move, weak = _moves(moves, o_k, o_k, length, states)
        faint = tl.maximum(faint, weak)
        if FORWARD:
            b_start = tl.where(o_k < ends, first_weight, 0.0)
        else:
            b_start = tl.where((o_k >= length - ends) & (o_k < length), first_weight, 0.0)
        b_values = tl.zeros([BLOCK], tl.float32)
        scale = NEVER
        # The next row is loaded a step ahead: nothing in the chain of steps then waits for memory.
        i = start if FORWARD else stop - 1
        stop_came = stop if turn > 0 else start  # nothing has come into the first block
        m_row = o_k < tl.where(start < stop, length, 0)
        m_came = o_k < tl.where(start < stop_came, length, 0)
        b_match = tl.load(match + i.to(tl.int64) * states + o_k, mask=m_row, other=float("-inf"))
        b_came = tl.load(values + i.to(tl.int64) * states + o_k, mask=m_came, other=0.0)
        came_scale = tl.load(scales + i * blocks + k, mask=start < stop_came, other=NEVER)
        for step in range(0, stop - start):
            i = start + step if FORWARD else stop - 1 - step
            ahead = i + 1 if FORWARD else i - 1
            m_row = o_k < tl.where((ahead >= start) & (ahead < stop), length, 0)
            more = (ahead >= start) & (ahead < stop_came)
            m_came = o_k < tl.where(more, length, 0)
            b_match_ahead = tl.load(match + ahead.to(tl.int64) * states + o_k, mask=m_row, other=float("-inf"))
            b_came_ahead = tl.load(values + ahead.to(tl.int64) * states + o_k, mask=m_came, other=0.0)
            came_scale_ahead = tl.load(scales + ahead * blocks + k, mask=more, other=NEVER)
            edge = (i == 0) if FORWARD else (i == n - 1)
            b_came = tl.where(edge, b_start, b_came)
            came_scale = tl.where(edge, 0.0, came_scale)
            if FORWARD:
                b_own = tl.sum(b_values[:, None] * b_move, 0)
            else:
                b_own = tl.sum(b_values[None, :] * b_move, 1)
            own_scale = scale - SHIFT
            both = tl.maximum(own_scale, came_scale)
            b_total = b_own * tl.exp2(own_scale - both) + b_came * tl.exp2(came_scale - both)
            b_inside = (o_k >= i) & (o_k <= slack + i)
            b_values, scale = _emit(b_total, both, b_match, b_inside)
            tl.store(values + i.to(tl.int64) * states + o_k, b_values, mask=o_k < length)
            tl.store(scales + i * blocks + k, scale)
            if not FORWARD:
                tl.store(tails + i.to(tl.int64) * states + o_k, b_total, mask=o_k < length)
                tl.store(tail_scales + i * blocks + k, both)
            b_match, b_came, came_scale = b_match_ahead, b_came_ahead, came_scale_ahead
        tl.debug_barrier()
    return faint


@triton.jit
def finish(log_likelihood, total, total_scale, b, log_sum, top):
    """Store log2 of the likelihood as a fraction and a whole part, and the likelihood in nats."""
    some = top > NEVER
    whole = tl.floor(tl.where(some, log_sum, 0.0))
    tl.store(total + b, tl.where(some, log_sum - whole, 0.0))
    tl.store(total_scale + b, tl.where(some, top + whole, NEVER))
    nats = (tl.where(some, top, 0.0).to(tl.float64) + tl.where(some, log_sum, 0.0).to(tl.float64)) * LN2
    tl.store(log_likelihood + b, tl.where(some, nats, float("-inf")).to(tl.float32))


@triton.jit
def scan_kernel(
    match, moves, num_targets, num_states, alpha, alpha_scale, omega, omega_scale, beta, beta_scale,
    log_likelihood, total, total_scale, faint, targets, states, blocks, ends, first_weight,
    BLOCK: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, ENDS: tl.constexpr, PRECISION: tl.constexpr,
):
    """Program 2b: alpha and likelihood of sequence b; 2b+1: beta, and omega = beta times the match."""
    b = (tl.program_id(0) // 2).to(tl.int64)
    n = tl.load(num_targets + b).to(tl.int32)
    length = tl.load(num_states + b).to(tl.int32)
    match += b * targets * states
    moves += b * states * states
    alpha += b * targets * states
    alpha_scale += b * targets * blocks
    if tl.program_id(0) % 2 == 0:
        weak = _recursion(
            match, moves, alpha, alpha_scale, alpha, alpha_scale, n, length, states, blocks, ends, first_weight,
            True, BLOCK, PART, ROWS, PRECISION,
        )
        tl.store(faint + b, weak)
        o_u = length - 1 - tl.arange(0, ENDS)
        m_u = (tl.arange(0, ENDS) < ends) & (o_u >= n - 1)
        b_last = tl.load(alpha + (n - 1).to(tl.int64) * states + o_u, mask=m_u, other=0.0)
        b_scale = tl.load(alpha_scale + (n - 1) * blocks + o_u // BLOCK, mask=m_u, other=NEVER)
        b_scale = tl.where(b_last > 0, b_scale, NEVER)
        top = tl.max(b_scale, 0)
        amount = tl.sum(b_last * tl.exp2(b_scale - top), 0)
        finish(log_likelihood, total, total_scale, b, tl.log2(tl.where(amount > 0, amount, 1.0)), top)
    else:
        _recursion(
            match, moves, omega + b * targets * states, omega_scale + b * targets * blocks,
            beta + b * targets * states, beta_scale + b * targets * blocks, n, length, states, blocks, ends, 1.0,
            False, BLOCK, PART, ROWS, PRECISION,
        )
