"""Likelihoods, posteriors with their check, and the recursions in log space for the sequences that fail it: those whose
probabilities fp32 cannot represent.
"""

from __future__ import annotations

import triton
import triton.language as tl

from exlm_dist.kernels.dag.triton.gradient import posteriors
from exlm_dist.kernels.dag.triton.recursion import LN2, LOG2E, NEVER, regions, split


@triton.jit
def _log_arrivals(transitions, values, i_from, o_u, n, length, states, FORWARD: tl.constexpr, SPAN: tl.constexpr):
    """log2 of the sum over v of values[i_from, v] times the transition between v and u, [SPAN]; -inf without one."""
    b_top = tl.full([SPAN], NEVER, tl.float32)
    b_sum = tl.zeros([SPAN], tl.float32)
    for first in range((i_from // SPAN) * SPAN, length - n + i_from + 1, SPAN):
        o_v = first + tl.arange(0, SPAN)
        m_v = (o_v >= i_from) & (o_v <= length - n + i_from)
        b_value = tl.load(values + i_from.to(tl.int64) * states + o_v, mask=m_v, other=float("-inf"))
        m_transition = m_v[:, None] & (o_u < length)[None, :]
        if FORWARD:
            m_transition = m_transition & (o_v[:, None] < o_u[None, :])
            p_transition = transitions + o_v[:, None].to(tl.int64) * states + o_u[None, :]
        else:
            m_transition = m_transition & (o_u[None, :] < o_v[:, None])
            p_transition = transitions + o_u[None, :].to(tl.int64) * states + o_v[:, None]
        b_path = tl.load(p_transition, mask=m_transition, other=float("-inf")) * LOG2E + b_value[:, None]
        b_new = tl.maximum(b_top, tl.max(b_path, 0))
        b_sum = b_sum * tl.exp2(b_top - b_new) + tl.sum(tl.exp2(b_path - b_new[None, :]), 0)
        b_top = b_new
    return tl.where(b_sum > 0, b_top + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), float("-inf"))


@triton.jit
def _log_recursion(
    match, transitions, values, scales, tails, tail_scales, n, length, states, blocks, ends, first_log,
    FORWARD: tl.constexpr, SPAN: tl.constexpr,
):
    """As `_recursion`, row by row, with `values` and `tails` in log2; returns the last row's scale."""
    slack = length - n
    scale = 0.0
    for step in range(0, n):
        i = n * 0 + step if FORWARD else n - 1 - step
        o_row = i.to(tl.int64) * states
        top = NEVER
        for first in range((i // SPAN) * SPAN, slack + i + 1, SPAN):
            o_u = first + tl.arange(0, SPAN)
            m_u = (o_u >= i) & (o_u <= slack + i)
            if step > 0:
                b_came = _log_arrivals(
                    transitions, values, i - 1 if FORWARD else i + 1, o_u, n, length, states, FORWARD, SPAN
                )
            else:
                if FORWARD:
                    b_came = tl.where(o_u < ends, first_log, float("-inf"))
                else:
                    b_came = tl.where(o_u >= length - ends, first_log, float("-inf"))
            tl.store(tails + o_row + o_u, b_came, mask=m_u)
            b_match = tl.load(match + o_row + o_u, mask=m_u, other=float("-inf"))
            b_some = m_u & (b_came > float("-inf")) & (b_match > float("-inf"))
            b_whole, _ = split(tl.where(b_some, b_match, 0.0))
            b_whole += tl.floor(tl.where(b_some, b_came, 0.0))
            top = tl.maximum(top, tl.max(tl.where(b_some, b_whole, NEVER), 0))
        tl.debug_barrier()
        top = tl.where(top > NEVER, top, 0.0)
        for first in range((i // SPAN) * SPAN, slack + i + 1, SPAN):
            o_u = first + tl.arange(0, SPAN)
            m_u = (o_u >= i) & (o_u <= slack + i)
            b_came = tl.load(tails + o_row + o_u, mask=m_u, other=float("-inf"))
            b_match = tl.load(match + o_row + o_u, mask=m_u, other=float("-inf"))
            b_some = m_u & (b_came > float("-inf")) & (b_match > float("-inf"))
            b_whole, b_part = split(tl.where(b_some, b_match, 0.0))
            b_came = tl.where(b_some, b_came, 0.0)
            b_carry = tl.floor(b_came)
            b_value = ((b_whole + b_carry) - top) + (b_part + (b_came - b_carry))
            tl.debug_barrier()  # values and tails may be the same: every warp has read, one writes
            tl.store(values + o_row + o_u, tl.where(b_some, b_value, float("-inf")), mask=m_u)
        for k in range(0, blocks):
            tl.store(tail_scales + i * blocks + k, scale)
            tl.store(scales + i * blocks + k, scale + top)
        scale += top
        tl.debug_barrier()
    return scale


@triton.jit
def _finish(log_likelihood, totals, log_sum, top):
    """Store and return log2 of the likelihood as a fraction and a whole part; store the likelihood in nats."""
    some = top > NEVER
    log_sum = tl.where(some, log_sum, 0.0)
    whole = tl.floor(log_sum)
    fraction = log_sum - whole
    nats = (tl.where(some, top, 0.0).to(tl.float64) + log_sum.to(tl.float64)) * LN2
    whole = tl.where(some, top + whole, NEVER)
    tl.store(totals, fraction)
    tl.store(totals + 1, whole)
    tl.store(log_likelihood, tl.where(some, nats, float("-inf")).to(tl.float32))
    return fraction, whole


@triton.jit(do_not_specialize=["targets", "states", "blocks"])
def check_kernel(
    match, transitions, num_targets, num_states, work, gamma, log_likelihood, counter, targets, states, blocks,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STATES: tl.constexpr, ENDS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Likelihood and posteriors of sequence b; if these fail their check, all of it again in log space, and counted."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.load(num_targets + b).to(tl.int32)
    length = tl.load(num_states + b).to(tl.int32)
    alpha, omega, alpha_scale, omega_scale, beta_scale, totals = regions(work, b, targets, states, blocks)
    o_u = length - 1 - tl.arange(0, SPAN)
    m_u = (tl.arange(0, SPAN) < ENDS) & (o_u >= n - 1)
    b_last = tl.load(alpha + ((n - 1) * states + o_u), mask=m_u, other=0.0)
    b_scale = tl.load(alpha_scale + ((n - 1) * blocks + o_u // BLOCK), mask=m_u, other=NEVER)
    b_scale = tl.where(b_last > 0, b_scale, NEVER)
    top = tl.max(b_scale, 0)
    amount = tl.sum(b_last * tl.exp2(b_scale - top), 0)
    fraction, whole = _finish(log_likelihood + b, totals, tl.log2(tl.where(amount > 0, amount, 1.0)), top)
    failed = posteriors(work, gamma, fraction, whole, b, n, length, targets, states, blocks, BLOCK, ROWS, COLUMNS)
    failed = tl.maximum(failed, tl.load(totals + 2).to(tl.int32))
    tl.store(totals + 3, failed.to(tl.float32))
    if failed > 0:
        before = tl.load(counter + b)
        tl.debug_barrier()  # from here on nobody reads the results of the recursions, or the counter
        tl.store(counter + b, before + 1)
        match += b * targets * states
        transitions += b * states * states
        gamma += b * targets * states
        first_log = tl.log2(tl.full([], 1.0 / ENDS, tl.float32))
        scale = _log_recursion(
            match, transitions, alpha, alpha_scale, alpha, beta_scale, n, length, states, blocks, ENDS, first_log,
            True, STATES,
        )
        _log_recursion(
            match, transitions, omega, omega_scale, gamma, beta_scale, n, length, states, blocks, ENDS, 0.0, False,
            STATES,
        )
        b_last = tl.load(alpha + (n - 1).to(tl.int64) * states + o_u, mask=m_u, other=float("-inf"))
        best = tl.max(b_last, 0)
        some = best > float("-inf")
        log_sum = tl.where(some, best, 0.0)
        log_sum += tl.log2(tl.sum(tl.where(some, tl.exp2(b_last - tl.where(some, best, 0.0)), 1.0), 0))
        _finish(log_likelihood + b, totals, log_sum, tl.where(some, scale, NEVER))
        for row in range(0, n):
            i = n * 0 + row
            o_row = i.to(tl.int64) * states
            shift = tl.load(alpha_scale + i * blocks) + tl.load(beta_scale + i * blocks) - scale
            for first in range(0, states, STATES):
                o_s = first + tl.arange(0, STATES)
                m_s = (o_s >= i) & (o_s <= tl.where(some, length - n + i, -1))
                b_alpha = tl.load(alpha + o_row + o_s, mask=m_s, other=float("-inf"))
                b_beta = tl.load(gamma + o_row + o_s, mask=m_s, other=float("-inf"))
                b_gamma = tl.exp2((b_alpha + b_beta) + (shift - log_sum))
                tl.debug_barrier()  # beta was in gamma: every warp has read it
                tl.store(gamma + o_row + o_s, b_gamma, mask=o_s < states)
