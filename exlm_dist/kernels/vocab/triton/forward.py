"""Log-sum-exp (lse) of the logits of each state, and the scores of a sequence's own targets; logits in base 2."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def logits(
    hidden, weight, bias, first_row, first_word, rows, vocab, width,
    ROWS: tl.constexpr, WORDS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """log2(e) times the logits [ROWS, WORDS]; DESCRIPTORS: hidden and weight are tensor descriptors (Hopper's bulk
    copies).
    """
    o_word = tl.minimum(first_word + tl.arange(0, WORDS), vocab - 1)
    b_total = tl.zeros([ROWS, WORDS], tl.float32)
    if DESCRIPTORS:
        for depth in range(0, width, DEPTH):
            b_hidden = hidden.load([first_row, depth])
            b_weight = weight.load([first_word, depth])
            b_total = tl.dot(b_hidden, tl.trans(b_weight), b_total, input_precision=PRECISION)
    else:
        # Rows and words past the end read the last one, so the loop needs no masks.
        o_row = tl.minimum(first_row + tl.arange(0, ROWS), rows - 1)
        o_d = tl.arange(0, DEPTH)
        p_hidden = hidden + o_row.to(tl.int64)[:, None] * width + o_d[None, :]
        p_weight = weight + o_word.to(tl.int64)[None, :] * width + o_d[:, None]
        for depth in range(0, width, DEPTH):
            if EVEN:
                b_hidden = tl.load(p_hidden)
                b_weight = tl.load(p_weight)
            else:
                b_hidden = tl.load(p_hidden, mask=(depth + o_d < width)[None, :], other=0.0)
                b_weight = tl.load(p_weight, mask=(depth + o_d < width)[:, None], other=0.0)
            b_total = tl.dot(b_hidden, b_weight, b_total, input_precision=PRECISION)
            p_hidden += DEPTH
            p_weight += DEPTH
    return (b_total + tl.load(bias + o_word).to(tl.float32)[None, :]) * LOG2E


@triton.jit
def tile_of_program(tiles_down, tiles_across, GROUP: tl.constexpr):
    """(tile down, tile across) of this program: GROUP tiles down run next to each other, so that both operands stay in
    the cache.
    """
    program = tl.program_id(0)
    group = program // (GROUP * tiles_across)
    height = tl.minimum(tiles_down - group * GROUP, GROUP)
    inside = program % (GROUP * tiles_across)
    return group * GROUP + inside % height, inside // height


@triton.jit(do_not_specialize=["rows", "vocab", "tiles"])
def partial_sum_kernel(
    hidden, weight, bias, top, total, rows, vocab, tiles, width,
    ROWS: tl.constexpr, WORDS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):
    """Largest logit and sum of 2^(logit - largest) of ROWS states over one tile of WORDS words, [tiles, rows]."""
    row, word = tile_of_program(tl.cdiv(rows, ROWS), tiles, GROUP)
    o_row = row * ROWS + tl.arange(0, ROWS)
    o_word = word * WORDS + tl.arange(0, WORDS)
    b_logit = logits(
        hidden, weight, bias, row * ROWS, word * WORDS, rows, vocab, width,
        ROWS, WORDS, DEPTH, EVEN, DESCRIPTORS, PRECISION,
    )
    b_logit = tl.where((o_word < vocab)[None, :], b_logit, LOWEST)
    b_top = tl.max(b_logit, 1)
    b_total = tl.sum(tl.exp2(b_logit - b_top[:, None]), 1)
    o_out = word.to(tl.int64) * rows + o_row
    tl.store(top + o_out, b_top, mask=o_row < rows)
    tl.store(total + o_out, b_total, mask=o_row < rows)


@triton.jit(do_not_specialize=["rows", "tiles"])
def lse_kernel(top, total, lse, rows, tiles, ROWS: tl.constexpr, TILES: tl.constexpr):
    """log2 of the sums of all tiles, in a fixed order."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b_top = tl.full([ROWS], LOWEST, tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    for first in range(0, tiles, TILES):
        o_tile = first + tl.arange(0, TILES)
        m_in = (o_tile < tiles)[:, None] & (o_row < rows)[None, :]
        o_in = o_tile[:, None].to(tl.int64) * rows + o_row[None, :]
        b_high = tl.load(top + o_in, mask=m_in, other=LOWEST)
        b_part = tl.load(total + o_in, mask=m_in, other=0.0)
        b_new = tl.maximum(b_top, tl.max(b_high, 0))
        b_sum = b_sum * tl.exp2(b_top - b_new) + tl.sum(b_part * tl.exp2(b_high - b_new[None, :]), 0)
        b_top = b_new
    tl.store(lse + o_row, b_top + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), mask=o_row < rows)


@triton.jit(do_not_specialize=["vocab", "first_token", "max_states", "max_targets"])
def match_kernel(
    hidden, weight, bias, target_ids, cu_states, cu_targets, lse, match,
    vocab, width, first_token, max_states, max_targets, rest,
    TARGETS: tl.constexpr, STATES: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """match[i, u] of a tile [TARGETS, STATES] of a sequence; `rest` outside its own targets and states.

    WHOLE: minus the lse. Else the plain logits, 0 for the tokens of other shards.
    """
    b = tl.program_id(2).to(tl.int64)
    first_state = tl.load(cu_states + b)
    states = (tl.load(cu_states + b + 1) - first_state).to(tl.int32)
    first_target = tl.load(cu_targets + b)
    targets = (tl.load(cu_targets + b + 1) - first_target).to(tl.int32)
    o_i = tl.program_id(1) * TARGETS + tl.arange(0, TARGETS)
    o_u = tl.program_id(0) * STATES + tl.arange(0, STATES)
    b_word = tl.load(target_ids + first_target + o_i, mask=o_i < targets, other=0) - first_token
    m_word = (b_word >= 0) & (b_word < vocab) & (o_i < targets)
    b_word = tl.where(m_word, b_word, 0)
    o_d = tl.arange(0, DEPTH)
    p_word = weight + b_word[:, None] * width + o_d[None, :]
    p_hidden = hidden + (first_state + tl.where(o_u < states, o_u, 0))[None, :] * width + o_d[:, None]
    b_total = tl.zeros([TARGETS, STATES], tl.float32)
    used = (tl.program_id(1) * TARGETS < targets) & (tl.program_id(0) * STATES < states)
    for depth in range(0, tl.where(used, width, 0), DEPTH):
        if EVEN:
            b_left = tl.load(p_word)
            b_right = tl.load(p_hidden)
        else:
            b_left = tl.load(p_word, mask=(depth + o_d < width)[None, :], other=0.0)
            b_right = tl.load(p_hidden, mask=(depth + o_d < width)[:, None], other=0.0)
        b_total = tl.dot(b_left, b_right, b_total, input_precision=PRECISION)
        p_word += DEPTH
        p_hidden += DEPTH
    b_total += tl.load(bias + b_word).to(tl.float32)[:, None]
    if WHOLE:
        b_total -= tl.load(lse + first_state + o_u, mask=o_u < states, other=0.0)[None, :] * LN2
    else:
        b_total = tl.where(m_word[:, None], b_total, 0.0)
    m_own = (o_i < targets)[:, None] & (o_u < states)[None, :]
    m_out = (o_i < max_targets)[:, None] & (o_u < max_states)[None, :]
    p_out = match + (b * max_targets + o_i)[:, None] * max_states + o_u[None, :]
    tl.store(p_out, tl.where(m_own, b_total, rest), mask=m_out)
