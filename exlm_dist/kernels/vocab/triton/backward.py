"""Gradients of the vocabulary match: of the logits of a chunk of words, and at the targets themselves; no atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from exlm_dist.kernels.vocab.triton.forward import logits, tile_of_program


@triton.jit(do_not_specialize=["rows", "vocab", "start", "accumulate"])
def logit_gradient_kernel(
    hidden, weight, bias, lse, gamma, grad, grad_bias, rows, vocab, chunk, start, accumulate, width,
    ROWS: tl.constexpr, WORDS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):
    """-gamma p of a tile of words start..start+chunk-1, [rows, chunk]; and its column sums, one row per tile of
    states. accumulate (0 or 1): add the sums to those of the earlier blocks of rows.
    """
    row, word = tile_of_program(tl.cdiv(rows, ROWS), tl.cdiv(chunk, WORDS), GROUP)
    o_row = row * ROWS + tl.arange(0, ROWS)
    o_column = word * WORDS + tl.arange(0, WORDS)
    b_logit = logits(
        hidden, weight, bias, row * ROWS, start + word * WORDS, rows, vocab, width,
        ROWS, WORDS, DEPTH, EVEN, DESCRIPTORS, PRECISION,
    )
    m_row = o_row < rows
    b_lse = tl.load(lse + o_row, mask=m_row, other=0.0)
    b_gamma = tl.load(gamma + o_row, mask=m_row, other=0.0)
    # A row without gradient gives 0 whatever is in it (padding rows may contain anything).
    b_grad = tl.where((b_gamma != 0)[:, None], -tl.exp2(b_logit - b_lse[:, None]) * b_gamma[:, None], 0.0)
    p_out = grad + o_row[:, None].to(tl.int64) * chunk + o_column[None, :]
    tl.store(p_out, b_grad.to(grad.dtype.element_ty), mask=m_row[:, None] & (o_column < chunk)[None, :])
    p_out = grad_bias + row.to(tl.int64) * vocab + start + o_column
    b_before = tl.load(p_out, mask=o_column < chunk * accumulate, other=0.0)
    tl.debug_barrier()  # several warps read it, one writes it
    tl.store(p_out, b_before + tl.sum(b_grad, 0), mask=o_column < chunk)


@triton.jit(do_not_specialize=["rows", "count", "vocab", "first_token", "max_states", "max_targets"])
def state_gradient_kernel(
    weight, target_ids, cu_states, cu_targets, grad_match, gamma, grad_hidden,
    rows, count, vocab, width, first_token, max_states, max_targets,
    TARGETS: tl.constexpr, STATES: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):
    """grad_hidden[u] = sum_i grad_match[i, u] weight[y_i] of STATES states, and their gamma = sum_i grad_match[i, u].

    The programs after the last sequence zero the rows that no sequence owns.
    """
    b = tl.program_id(2).to(tl.int64)
    owned = b < count
    first_state = tl.load(cu_states + b)
    first_target = tl.load(cu_targets + tl.minimum(b, count - 1))
    states = (tl.load(cu_states + tl.minimum(b + 1, count)) - first_state).to(tl.int32)
    states = tl.where(owned, states, (rows - first_state).to(tl.int32))
    targets = (tl.load(cu_targets + tl.minimum(b + 1, count)) - first_target).to(tl.int32)
    targets = tl.where(owned, targets, 0)
    o_d = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    for base in range(tl.program_id(0) * STATES, states, tl.num_programs(0) * STATES):
        o_u = base + tl.arange(0, STATES)
        b_total = tl.zeros([STATES, DEPTH], tl.float32)
        b_gamma = tl.zeros([STATES], tl.float32)
        for first in range(0, targets, TARGETS):
            o_i = first + tl.arange(0, TARGETS)
            b_word = tl.load(target_ids + first_target + o_i, mask=o_i < targets, other=0) - first_token
            m_word = (b_word >= 0) & (b_word < vocab) & (o_i < targets)
            m_in = (o_i < targets)[None, :] & (o_u < states)[:, None]
            p_grad = grad_match + (b * max_targets + o_i)[None, :] * max_states + o_u[:, None]
            b_grad = tl.load(p_grad, mask=m_in, other=0.0)
            b_gamma += tl.sum(b_grad, 1)
            p_word = weight + tl.where(m_word, b_word, 0)[:, None] * width + o_d[None, :]
            b_row = tl.load(p_word, mask=m_word[:, None] & (o_d < width)[None, :], other=0.0)
            b_total = tl.dot(b_grad, b_row.to(tl.float32), b_total, input_precision=PRECISION)
        m_out = (o_u < states)[:, None] & (o_d < width)[None, :]
        tl.store(grad_hidden + (first_state + o_u)[:, None] * width + o_d[None, :], b_total, mask=m_out)
        tl.store(gamma + first_state + o_u, b_gamma, mask=o_u < tl.where(tl.program_id(1) == 0, states, 0))


@triton.jit(do_not_specialize=["max_states", "max_targets", "count"])
def target_gradient_kernel(
    hidden, cu_states, cu_targets, grad_match, grad_target, grad_target_bias, width, max_states, max_targets, count,
    TARGETS: tl.constexpr, STATES: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):
    """grad_target[i] = sum_u grad_match[i, u] hidden[u] of TARGETS targets of a sequence, and the plain sums over u."""
    b = tl.program_id(2).to(tl.int64)
    first_state = tl.load(cu_states + b)
    states = (tl.load(cu_states + b + 1) - first_state).to(tl.int32)
    first_target = tl.load(cu_targets + b)
    targets = (tl.load(cu_targets + b + 1) - first_target).to(tl.int32)
    o_i = tl.program_id(1) * TARGETS + tl.arange(0, TARGETS)
    o_d = tl.program_id(0) * DEPTH + tl.arange(0, DEPTH)
    b_total = tl.zeros([TARGETS, DEPTH], tl.float32)
    b_sum = tl.zeros([TARGETS], tl.float32)
    for first in range(0, tl.where(tl.program_id(1) * TARGETS < targets, states, 0), STATES):
        o_u = first + tl.arange(0, STATES)
        m_in = (o_i < targets)[:, None] & (o_u < states)[None, :]
        p_grad = grad_match + (b * max_targets + o_i)[:, None] * max_states + o_u[None, :]
        b_grad = tl.load(p_grad, mask=m_in, other=0.0)
        b_sum += tl.sum(b_grad, 1)
        m_row = (o_u < states)[:, None] & (o_d < width)[None, :]
        b_row = tl.load(hidden + (first_state + o_u)[:, None] * width + o_d[None, :], mask=m_row, other=0.0)
        b_total = tl.dot(b_grad, b_row.to(tl.float32), b_total, input_precision=PRECISION)
    m_out = (o_i < targets)[:, None] & (o_d < width)[None, :]
    tl.store(grad_target + (first_target + o_i)[:, None] * width + o_d[None, :], b_total, mask=m_out)
    tl.store(grad_target_bias + first_target + o_i, b_sum, mask=o_i < targets)


@triton.jit(do_not_specialize=["targets", "vocab", "first_token", "count"])
def scatter_kernel(
    ids, order, cu_targets, grad_target, grad_target_bias, grad_weight, grad_bias,
    targets, vocab, width, first_token, count,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):
    """Add to the row of a token the gradients of its targets; the program of the token's first target owns the row."""
    j = tl.program_id(1)
    token = tl.load(ids + j)
    word = token - first_token
    starts = (j == 0) | (tl.load(ids + tl.maximum(j - 1, 0)) != token)
    owned = tl.load(cu_targets + count)
    if starts & (word >= 0) & (word < vocab):
        o_d = tl.program_id(0) * DEPTH + tl.arange(0, DEPTH)
        b_total = tl.zeros([DEPTH], tl.float32)
        sum_bias = 0.0
        first = j
        here = token
        while here == token:  # equal tokens lie side by side
            o_j = first + tl.arange(0, ROWS)
            m_j = tl.load(ids + o_j, mask=o_j < targets, other=-1) == token
            b_index = tl.load(order + o_j, mask=m_j, other=0)
            m_j = m_j & (b_index < owned)  # padding targets contribute nothing
            m_row = m_j[:, None] & (o_d < width)[None, :]
            b_total += tl.sum(tl.load(grad_target + b_index[:, None] * width + o_d[None, :], mask=m_row, other=0.0), 0)
            sum_bias += tl.sum(tl.load(grad_target_bias + b_index, mask=m_j, other=0.0), 0)
            first += ROWS
            here = tl.load(ids + first, mask=first < targets, other=-1)
        p_out = grad_weight + word * width + o_d
        b_old = tl.load(p_out, mask=o_d < width, other=0.0).to(tl.float32)
        tl.store(p_out, (b_old + b_total).to(grad_weight.dtype.element_ty), mask=o_d < width)
        if tl.program_id(0) == 0:
            before = tl.load(grad_bias + word)
            tl.debug_barrier()  # every warp reads it, one writes it
            tl.store(grad_bias + word, before + sum_bias)
