"""The recursions in the probability domain: blocks of states, matrix products between them, row by row inside.

Row i of alpha over a block of states is stored as values <= 4 times two to an integer `scale`, so offsets are exact and
only differences between neighbours are rounded. What enters a block from all earlier blocks is one matrix product over
all rows; only transitions inside the block, which stay in registers, are applied row by row. alpha and beta run side by
side.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_REST = tl.constexpr(1.9259629911266175e-8)  # log2(e) minus its fp32 value
LN2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(-1.0e30)  # scale of a row without any path
SHIFT = tl.constexpr(60.0)  # transitions are stored times 2^60, so that fp32 reaches down to exp(-128)
UNDERFLOW = tl.constexpr(-185.0)  # log2 below which a transition underflows despite that shift
SMALLEST = tl.constexpr(1.0e-37)
# Values per sequence: log2 of its likelihood (fraction, whole part), if a transition underflows, if it took log space
TOTALS = tl.constexpr(4)


@triton.jit
def regions(work, b, targets, states, blocks):
    """alpha, omega [N, L], the scales of alpha, omega and beta [N, blocks] and the totals of sequence b in `work`
    (`work_size`).
    """
    rows = targets * states
    scales = targets * blocks
    # Addresses within a sequence fit in 32 bits (checked by the caller); where a sequence starts may not.
    alpha = work + b * (2 * rows + 3 * scales + TOTALS)
    alpha_scale = alpha + 2 * rows
    return alpha, alpha + rows, alpha_scale, alpha_scale + scales, alpha_scale + 2 * scales, alpha_scale + 3 * scales


@triton.jit
def split(x):
    """Whole and fractional part of x log2(e), the fraction exact to fp32 however large x is."""
    high = x * LOG2E
    whole = tl.floor(high)
    return whole, (high - whole) + (tl.fma(x, LOG2E, -high) + x * LOG2E_REST)


@triton.jit
def _emit(b_total, scale, b_match, b_inside):
    """total 2^scale e^match as (values, scale), the largest value between 1 and 4."""
    b_some = b_inside & (b_total > SMALLEST) & (b_match > float("-inf"))
    b_whole, b_part = split(tl.where(b_some, b_match, 0.0))
    b_log = tl.log2(tl.where(b_some, b_total, 1.0))
    b_carry = tl.floor(b_log)
    b_whole = tl.where(b_some, b_whole + b_carry, NEVER)
    top = tl.max(b_whole, 0)
    b_values = tl.where(b_some, tl.exp2((b_whole - top) + (b_part + (b_log - b_carry))), 0.0)
    return b_values, tl.where(top > NEVER, scale + top, NEVER)


@triton.jit
def _load_transitions(transitions, o_u, o_v, step_v, step_u, length, transposed):
    """Probabilities [u, v] of transitions from v to u times 2^SHIFT, 0 where not allowed; and whether one underflows.

    The hints lay threads along the first axis. On the way back the sources are adjacent in memory: `transposed` reads
    such a tile with its axes swapped. The tile inside a block must not be read so, or the sum over its sources would no
    longer stay within a thread; its hint then promises a contiguity that does not exist, which only changes which
    thread reads what: loads stay one element wide because nothing is promised about alignment.
    """
    if transposed == 0:
        m_transition = (o_v >= 0)[None, :] & (o_v[None, :] < o_u[:, None]) & (o_u < length)[:, None]
        o_transition = tl.max_contiguous(o_u[:, None] * step_u + o_v[None, :] * step_v, [32, 1])
        b_log = tl.load(transitions + o_transition, mask=m_transition, other=float("-inf")) * LOG2E
    else:
        m_transposed = (o_v >= 0)[:, None] & (o_v[:, None] < o_u[None, :]) & (o_u < length)[None, :]
        o_transposed = tl.max_contiguous(o_u[None, :] * step_u + o_v[:, None] * step_v, [16, 1])
        b_log = tl.trans(tl.load(transitions + o_transposed, mask=m_transposed, other=float("-inf")) * LOG2E)
    lowest = tl.min(tl.min(tl.where(b_log > float("-inf"), b_log, 0.0), 1), 0)
    return tl.exp2(b_log + SHIFT), tl.where(lowest < UNDERFLOW, 1, 0)


@triton.jit
def _arrivals(
    transitions, values, scales, k, o_i, m_i, n, length, pad, sign, step_v, step_u, states, blocks,
    BLOCK: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):
    """[BLOCK, ROWS] that enters block k from the blocks before it, with its scale per row; and `underflow`."""
    o_k = k * BLOCK - pad + tl.arange(0, BLOCK)
    o_from = o_i - 1
    b_total = tl.zeros([BLOCK, ROWS], tl.float32)
    b_scale = tl.full([ROWS], NEVER, tl.float32)
    underflow = 0
    for j in range(0, k):
        edge = j * BLOCK - pad
        m_from = m_i & (o_from >= tl.maximum(edge - (length - n), 0)) & (o_from < tl.minimum(edge + BLOCK, n))
        b_came = tl.load(scales + (o_from * blocks + j) * sign, mask=m_from, other=NEVER) - SHIFT
        b_new = tl.maximum(b_scale, b_came)
        b_total *= tl.exp2(b_scale - b_new)[None, :]
        b_factor = tl.exp2(b_came - b_new)
        for part in range(0, BLOCK, PART):
            o_p = edge + part + tl.arange(0, PART)
            m_values = m_from[None, :] & ((o_p >= 0) & (o_p < length))[:, None]
            p_values = values + (o_from[None, :] * states + o_p[:, None]) * sign
            b_values = tl.load(p_values, mask=m_values, other=0.0) * b_factor[None, :]
            transposed = tl.where(sign < 0, 1, 0)
            b_transition, tile_underflow = _load_transitions(
                transitions, o_k, o_p, step_v, step_u, length, transposed
            )
            b_total = tl.dot(b_transition, b_values, b_total, input_precision=PRECISION)
            underflow = tl.maximum(underflow, tile_underflow)
        b_scale = b_new
    return b_total, b_scale, underflow


@triton.jit
def _inside(
    match, transitions, values, scales, tails, tail_scales, k, start, stop, n, length, pad, sign, step_v, step_u,
    states, blocks, ends, first_weight, BLOCK: tl.constexpr,
):
    """Rows start..stop-1 of block k, one after the other; what enters from other blocks is in `values` and `scales`."""
    o_k = k * BLOCK - pad + tl.arange(0, BLOCK)
    b_transition, underflow = _load_transitions(transitions, o_k, o_k, step_v, step_u, length, 0)
    m_k = (o_k >= 0) & (o_k < length)
    b_start = tl.where(m_k & (o_k < ends), first_weight, 0.0)
    b_values = tl.zeros([BLOCK], tl.float32)
    scale = NEVER
    came_stop = tl.where(k > 0, stop, start)  # nothing enters the first block
    # The next row is loaded a step ahead, so that nothing in the chain of steps waits for memory.
    o_row = (start * states + o_k) * sign
    b_match = tl.load(match + o_row, mask=m_k & (o_k < tl.where(start < stop, length, 0)), other=float("-inf"))
    b_came = tl.load(values + o_row, mask=m_k & (o_k < tl.where(start < came_stop, length, 0)), other=0.0)
    came_scale = tl.load(scales + (start * blocks + k) * sign, mask=start < came_stop, other=NEVER)
    for row in range(0, stop - start):
        i = start + row
        o_next = ((i + 1) * states + o_k) * sign
        b_match_next = tl.load(
            match + o_next, mask=m_k & (o_k < tl.where(i + 1 < stop, length, 0)), other=float("-inf")
        )
        b_came_next = tl.load(values + o_next, mask=m_k & (o_k < tl.where(i + 1 < came_stop, length, 0)), other=0.0)
        came_scale_next = tl.load(scales + ((i + 1) * blocks + k) * sign, mask=i + 1 < came_stop, other=NEVER)
        b_came = tl.where(i == 0, b_start, b_came)
        came_scale = tl.where(i == 0, 0.0, came_scale)
        own_scale = scale - SHIFT
        both = tl.maximum(own_scale, came_scale)
        b_total = tl.sum(b_values[None, :] * b_transition, 1) * tl.exp2(own_scale - both)
        b_total += b_came * tl.exp2(came_scale - both)
        b_band = m_k & (o_k >= i) & (o_k <= length - n + i)
        b_values, scale = _emit(b_total, both, b_match, b_band)
        o_row = (i * states + o_k) * sign
        tl.store(values + o_row, b_values, mask=m_k)
        tl.store(scales + (i * blocks + k) * sign, scale)
        # Backward only: the recursion before the match is beta itself.
        tl.store(tails + o_row, b_total, mask=m_k & (o_k < tl.where(sign < 0, length, 0)))
        tl.store(tail_scales + (i * blocks + k) * sign, both, mask=sign < 0)
        b_match, b_came, came_scale = b_match_next, b_came_next, came_scale_next
    return underflow


@triton.jit
def _recursion(
    match, transitions, values, scales, tails, tail_scales, n, length, pad, sign, step_v, step_u,
    states, blocks, ends, first_weight,
    BLOCK: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):
    """One direction of the recursion, block by block, into `values` and `scales`; whether a transition underflows.

    Pointers are at the first target and state in the direction of travel; `sign` is -1 for travel from the last.
    Blocks have the same edges in both directions, so the first block of the way back starts `pad` states early.
    """
    underflow = 0
    for k in range(0, tl.cdiv(length, BLOCK)):
        start = tl.maximum(k * BLOCK - pad - (length - n), 0)
        stop = tl.minimum((k + 1) * BLOCK - pad, n)
        o_k = k * BLOCK - pad + tl.arange(0, BLOCK)
        for first in range(start, tl.where(k > 0, stop, start), ROWS):
            o_i = first + tl.arange(0, ROWS)
            b_total, b_scale, block_underflow = _arrivals(
                transitions, values, scales, k, o_i, o_i < stop, n, length, pad, sign, step_v, step_u, states, blocks,
                BLOCK, PART, ROWS, PRECISION,
            )
            underflow = tl.maximum(underflow, block_underflow)
            m_out = (o_i < stop)[None, :] & ((o_k >= 0) & (o_k < length))[:, None]
            tl.store(values + (o_i[None, :] * states + o_k[:, None]) * sign, b_total, mask=m_out)
            tl.store(scales + (o_i * blocks + k) * sign, b_scale, mask=o_i < stop)
        tl.debug_barrier()
        block_underflow = _inside(
            match, transitions, values, scales, tails, tail_scales, k, start, stop, n, length, pad, sign, step_v,
            step_u, states, blocks, ends, first_weight, BLOCK,
        )
        underflow = tl.maximum(underflow, block_underflow)
        tl.debug_barrier()
    return underflow


@triton.jit(do_not_specialize=["targets", "states", "blocks"])
def scan_kernel(
    match, transitions, num_targets, num_states, work, beta, targets, states, blocks,
    BLOCK: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, ENDS: tl.constexpr, PRECISION: tl.constexpr,
):
    """Program 2b: alpha of sequence b; 2b+1: beta, and omega = beta times the match."""
    b = (tl.program_id(0) // 2).to(tl.int64)
    back = tl.program_id(0) % 2
    n = tl.load(num_targets + b).to(tl.int32)
    length = tl.load(num_states + b).to(tl.int32)
    alpha, omega, alpha_scale, omega_scale, beta_scale, totals = regions(work, b, targets, states, blocks)
    last = back * ((n - 1) * states + length - 1)
    last_block = back * ((n - 1) * blocks + tl.cdiv(length, BLOCK) - 1)
    rows = b * targets * states + last
    values = alpha + last
    scales = alpha_scale + last_block
    if back == 1:
        values = omega + last
        scales = omega_scale + last_block
    underflow = _recursion(
        match + rows, transitions + (b * states * states + back * (length - 1) * (states + 1)), values, scales,
        beta + rows, beta_scale + last_block, n, length, back * (tl.cdiv(length, BLOCK) * BLOCK - length), 1 - 2 * back,
        states - back * (states + 1), 1 - back * (states + 1), states, blocks, ENDS,
        tl.where(back == 1, 1.0, 1.0 / ENDS), BLOCK, PART, ROWS, PRECISION,
    )
    if back == 0:
        tl.store(totals + 2, underflow.to(tl.float32))
