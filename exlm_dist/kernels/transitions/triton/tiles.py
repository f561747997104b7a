"""Common to the kernels of the transitions: which transitions are allowed, tiles of states and of transitions.

An address is a 64-bit start, one for the whole program, and an offset from there that fits in 32 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def allowed(o_v, o_u, length, GROUP: tl.constexpr):
    """[v, u]: may state u follow state v. One comparison: no u of the sequence comes after a v past its end."""
    if GROUP == 0:
        return o_v[:, None] < tl.where(o_u < length, o_u, -1)[None, :]
    else:
        return (o_v // GROUP + 1)[:, None] == tl.where(o_u < length, o_u // GROUP, -1)[None, :]


@triton.jit
def after(first, count, length, GROUP: tl.constexpr):
    """Range of states that can follow one of first..first+count-1."""
    if GROUP == 0:
        start = first + 1
        stop = length
    else:
        start = (first // GROUP + 1) * GROUP
        stop = tl.minimum(((first + count - 1) // GROUP + 2) * GROUP, length)
    return start, stop


@triton.jit
def before(first, count, GROUP: tl.constexpr):
    """Range of states that can come before one of first..first+count-1."""
    if GROUP == 0:
        start = first * 0
        stop = first + count - 1
    else:
        start = tl.maximum((first // GROUP - 1) * GROUP, 0)
        stop = ((first + count - 1) // GROUP) * GROUP
    return start, stop


@triton.jit
def sequence(cu_states, b):
    """First state of a sequence (64 bits), and how many it has (32 bits)."""
    first = tl.load(cu_states + b)
    return first, (tl.load(cu_states + b + 1) - first).to(tl.int32)


@triton.jit
def load_rows(pointer, first, count, heads: tl.constexpr, width: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS, BLOCK] of a head (that of `pointer`) from state `first` of [S, H, P] on; zero after `count` rows."""
    o_row = tl.arange(0, ROWS)
    o_p = tl.arange(0, BLOCK)
    m_row = (o_row < count)[:, None]
    if BLOCK != width:
        m_row = m_row & (o_p < width)[None, :]
    pointer += first * (heads * width)
    return tl.load(pointer + (o_row[:, None] * (heads * width) + o_p[None, :]), mask=m_row, other=0.0)


@triton.jit
def store_rows(
    pointer, first, count, b_value, heads: tl.constexpr, width: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """The inverse of `load_rows`."""
    o_row = tl.arange(0, ROWS)
    o_p = tl.arange(0, BLOCK)
    m_out = (o_row < count)[:, None] & (o_p < width)[None, :]
    pointer += first * (heads * width)
    o_out = o_row[:, None] * (heads * width) + o_p[None, :]
    tl.store(pointer + o_out, b_value.to(pointer.dtype.element_ty), mask=m_out)


@triton.jit
def transition_tile(b, row, column, side, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr):
    """Start of a tile in [B, L, L], offsets from there, and which are inside; L is side * ALIGN.

    ALIGN words are read at once. The mask must not differ within them, as that of the allowed transitions would.
    """
    longest = side * ALIGN
    o_v = tl.arange(0, ROWS)[:, None]
    o_u = tl.arange(0, COLUMNS)[None, :]
    start = (b * longest + row) * longest + column
    return start, o_v * longest + o_u, (o_v < longest - row) & (o_u < longest - column)


@triton.jit
def prior_scores(
    row, column, slope, lowest, PRIOR: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The prior over jumps of a tile of transitions, in units of q.k; 0 where there is none (PRIOR "none").

    It is a function of how far a jump is from the expected one, in states or (PRIOR "group") in groups of STEP.
    """
    if PRIOR == "none":
        return tl.zeros([ROWS, COLUMNS], tl.float32)
    else:
        o_v = row + tl.arange(0, ROWS)
        o_u = column + tl.arange(0, COLUMNS)
        if PRIOR == "group":
            o_v = o_v // STEP + 1
            o_u = o_u // STEP
        else:
            o_v = o_v + STEP
        b_surplus = o_u.to(tl.float32)[None, :] - o_v.to(tl.float32)[:, None]
        b_surplus = b_surplus * b_surplus if PRIOR == "gaussian" else tl.abs(b_surplus)
        return tl.maximum(b_surplus * slope, lowest)


@triton.jit
def scores(
    query, key, base, b_prior, first, row, column, length, h, scale, rows, heads: tl.constexpr, width: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):
    """log2 of gate times probability of head h, for a tile of transitions."""
    b_query = load_rows(query + h * width, first + row, length - row, heads, width, ROWS, BLOCK)
    b_key = load_rows(key + h * width, first + column, length - column, heads, width, COLUMNS, BLOCK)
    o_v = row + tl.arange(0, ROWS)
    b_base = tl.load(base + (tl.cast(h, tl.int64) * rows + first) + o_v, mask=o_v < length, other=0.0)
    return tl.dot(b_query, tl.trans(b_key), b_prior, input_precision=PRECISION) * scale + b_base[:, None]


@triton.jit
def log_gates(gate, o_row, m_row, heads: tl.constexpr, HEADS: tl.constexpr):
    """log2 of the gates of states, [rows, HEADS]; -inf past the last head."""
    o_h = tl.arange(0, HEADS)
    m_gate = m_row[:, None] & (o_h < heads)[None, :]
    b_gate = tl.load(gate + (o_row[:, None] * heads + o_h[None, :]), mask=m_gate, other=0.0).to(tl.float32)
    b_gate = tl.where((o_h < heads)[None, :], b_gate, float("-inf"))
    b_gate = (b_gate - tl.max(b_gate, 1)[:, None]) * LOG2E
    return b_gate - tl.log2(tl.sum(tl.exp2(b_gate), 1))[:, None]
