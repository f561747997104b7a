"""Posteriors of (target, state), their check, and the gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from exlm_dist.kernels.dag.triton.recursion import LOG2E, NEVER, SHIFT, regions

GUARD = tl.constexpr(1.0e-4)  # |sum of a target's posteriors - 1| that sends a sequence to the log domain


@triton.jit
def posteriors(
    work, gamma, fraction, whole, b, n, length, targets, states, blocks,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """alpha beta / likelihood of sequence b, written over beta, which is in `gamma`; 1 if a row fails to sum to 1."""
    alpha, _, alpha_scale, _, beta_scale, _ = regions(work, b, targets, states, blocks)
    gamma += b * targets * states
    slack = length - n
    own = tl.where(whole > NEVER, n, 0)
    failed = 0
    for top in range(0, targets, ROWS):
        o_i = top + tl.arange(0, ROWS)
        b_sum = tl.zeros([ROWS], tl.float32)
        for first in range(0, states, COLUMNS):
            o_u = (first + tl.arange(0, COLUMNS))[None, :]
            o_in = o_i[:, None] * states + o_u
            m_in = (o_i < own)[:, None] & (o_u >= o_i[:, None]) & (o_u <= slack + o_i[:, None])
            b_alpha = tl.load(alpha + o_in, mask=m_in, other=0.0)
            b_beta = tl.load(gamma + o_in, mask=m_in, other=0.0)
            o_scale = o_i[:, None] * blocks + o_u // BLOCK
            b_shift = tl.load(alpha_scale + o_scale, mask=m_in, other=NEVER)
            b_shift += tl.load(beta_scale + o_scale, mask=m_in, other=NEVER) - whole
            b_shift = tl.minimum(tl.maximum(b_shift, -250.0), 250.0)
            b_half = tl.floor(b_shift * 0.5)
            b_gamma = (b_alpha * tl.exp2(b_half)) * (b_beta * tl.exp2(b_shift - b_half)) * tl.exp2(-fraction)
            tl.store(gamma + o_in, b_gamma, mask=(o_i < targets)[:, None] & (o_u < states))
            b_sum += tl.sum(b_gamma, 1)
        b_good = (tl.abs(b_sum - 1.0) <= GUARD) | (o_i >= n)  # a sum that is NaN is bad
        failed = tl.maximum(failed, 1 - tl.min(b_good.to(tl.int32), 0))
    return failed


@triton.jit
def _match_rows(
    gamma, grad_out, whole, grad_match, b, first, targets, states, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """grad_match = grad_out gamma of ROWS targets; 0 for a sequence without a path, whatever grad_out is."""
    scale = tl.where(whole > NEVER, tl.load(grad_out + b), 0.0)
    o_row = first + tl.arange(0, ROWS)
    for column in range(0, states, COLUMNS):
        o_u = column + tl.arange(0, COLUMNS)
        o_out = (b * targets + o_row)[:, None] * states + o_u[None, :]
        m_out = (o_row < targets)[:, None] & (o_u < states)[None, :]
        tl.store(grad_match + o_out, tl.load(gamma + o_out, mask=m_out, other=0.0) * scale, mask=m_out)


@triton.jit(do_not_specialize=["targets", "states", "blocks"])
def gradient_kernel(
    transitions, num_targets, num_states, work, gamma, grad_out, grad_match, grad_transitions, targets, states, blocks,
    BLOCK: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):
    """Gradients of match and transitions, times grad_out. The first tiles^2 programs do a tile of transitions each, the
    others ROWS targets.

    grad_transitions[v, u] = E[v, u] sum_i alpha[i-1, v] omega[i, u] / likelihood: the expected number of times that a
    transition is taken.
    """
    b = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(states, TILE)
    alpha, omega, alpha_scale, omega_scale, _, totals = regions(work, b, targets, states, blocks)
    whole = tl.load(totals + 1)
    if tl.program_id(0) >= tiles * tiles:
        first = (tl.program_id(0) - tiles * tiles) * ROWS
        _match_rows(gamma, grad_out, whole, grad_match, b, first, targets, states, ROWS, 128)
    else:
        j = tl.program_id(0) // tiles
        k = tl.program_id(0) % tiles
        o_v = j * TILE + tl.arange(0, TILE)
        o_u = k * TILE + tl.arange(0, TILE)
        o_out = o_v[:, None] * states + o_u[None, :]
        transitions += b * states * states
        n = tl.load(num_targets + b).to(tl.int32)
        length = tl.load(num_states + b).to(tl.int32)
        slack = length - n
        fraction = tl.load(totals)
        alpha_scale += (j * TILE) // BLOCK
        omega_scale += (k * TILE) // BLOCK
        b_total = tl.zeros([TILE, TILE], tl.float32)
        # Rows i whose band, and that of i - 1 before it, touch the two tiles; none below the diagonal.
        start = tl.maximum(tl.maximum(k * TILE - slack, j * TILE - slack + 1), 1)
        stop = tl.minimum(tl.minimum((k + 1) * TILE, (j + 1) * TILE + 1), n)
        stop = tl.where((k >= j) & (k * TILE < length) & (whole > NEVER), stop, start)
        if tl.load(totals + 3) == 0:
            for first in range(start, stop, DEPTH):
                o_i = first + tl.arange(0, DEPTH)
                m_i = o_i < stop
                b_shift = tl.load(alpha_scale + (o_i - 1) * blocks, mask=m_i, other=NEVER)
                b_shift += tl.load(omega_scale + o_i * blocks, mask=m_i, other=NEVER) - (whole + SHIFT)
                b_shift = tl.minimum(tl.maximum(b_shift, -250.0), 250.0)
                b_half = tl.floor(b_shift * 0.5)
                m_v = m_i[:, None] & (o_v[None, :] >= o_i[:, None] - 1) & (o_v[None, :] <= slack + o_i[:, None] - 1)
                b_alpha = tl.load(alpha + ((o_i - 1)[:, None] * states + o_v[None, :]), mask=m_v, other=0.0)
                m_u = m_i[:, None] & (o_u[None, :] >= o_i[:, None]) & (o_u[None, :] <= slack + o_i[:, None])
                b_omega = tl.load(omega + (o_i[:, None] * states + o_u[None, :]), mask=m_u, other=0.0)
                b_alpha *= tl.exp2(b_half)[:, None]
                b_omega *= tl.exp2(b_shift - b_half)[:, None]
                b_total = tl.dot(tl.trans(b_alpha), b_omega, b_total, input_precision=PRECISION)
            b_transition = _load_log_transitions(transitions, o_out, o_v, o_u, length) + SHIFT
            b_total = tl.where(b_transition > -120.0, tl.exp2(b_transition) * b_total, 0.0) * tl.exp2(-fraction)
        else:
            b_transition = _load_log_transitions(transitions, o_out, o_v, o_u, length)
            for row in range(0, stop - start):
                i = start + row
                shift = tl.load(alpha_scale + (i - 1) * blocks) + tl.load(omega_scale + i * blocks) - whole
                m_v = (o_v >= i - 1) & (o_v <= slack + i - 1)
                m_u = (o_u >= i) & (o_u <= slack + i)
                b_alpha = tl.load(alpha + ((i - 1) * states + o_v), mask=m_v, other=float("-inf"))
                b_omega = tl.load(omega + (i * states + o_u), mask=m_u, other=float("-inf"))
                b_total += tl.exp2((b_alpha[:, None] + b_omega[None, :]) + (shift - fraction) + b_transition)
        b_total *= tl.where(whole > NEVER, tl.load(grad_out + b), 0.0)
        m_out = (o_v < states)[:, None] & (o_u < states)[None, :]
        tl.store(grad_transitions + b * states * states + o_out, b_total, mask=m_out)


@triton.jit
def _load_log_transitions(transitions, o_transition, o_v, o_u, length):
    m_transition = (o_v[:, None] < o_u[None, :]) & (o_u < length)[None, :]
    return tl.load(transitions + o_transition, mask=m_transition, other=float("-inf")) * LOG2E
