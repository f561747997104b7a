"""Backward kernels of attention: one for grad q, then one for grad k and v; each program owns what it writes.

The `lse` of the forward pass is in base 2: log2 of the sum over the keys of 2^(score * scale), fp32 [H, T].
"""

import triton
import triton.language as tl

from exlm_dist.kernels.attention.triton.tiles import (
    angles_at,
    keeps,
    load_rotated,
    load_rows,
    mask_keys,
    product,
    store_rotated_back,
    store_rows,
    store_sums,
    sums_of_tile,
    tile_of_program,
    zero_tail,
)


@triton.jit(do_not_specialize=["first_head", "site", "dropped", "lower", "upper"])
def backward_queries(
    q, k, v, table, cu_seqlens, out, grad_out, lse,  # as in `forward`; grad_out contiguous
    delta,  # [H, T] fp32 out: sum of grad_out * out per row
    rotated,  # [2, T, H, BP]: q and k rotated, read where ROTATED; else only q, written for `backward_keys`
    grad_q,  # [T, H, P] out, strides (stride_grad, stride_grad_head, 1)
    sums,  # [slots, H, 3, P] fp32 out, with SUMS: sums of grad q, k and v over the rows of a tile
    tokens, sequences, heads, chunks, lower, upper, stride, stride_head, stride_grad, stride_grad_head,
    slot_rows, scale, grad_scale, first_head, seed, site, dropped, dropout_scale, opaque_zero,
    P: tl.constexpr, HALF: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, DROPOUT: tl.constexpr, TAIL: tl.constexpr, SUMS: tl.constexpr,
    ROTATED: tl.constexpr,
):  # fmt: skip
    """One program: grad q of BQ queries of one sequence and head."""
    sequence, head, chunk, first = tile_of_program(cu_seqlens, sequences, heads, chunks)
    if TAIL:
        if sequence == sequences:
            zero_tail(grad_q + head * stride_grad_head, first, tokens, chunk, chunks, stride_grad, P, BP, BQ)
            return
    count = (tl.load(cu_seqlens + sequence + 1) - first).to(tl.int32)
    if count <= lower or count > upper or chunk * BQ >= count:
        return
    o_query = tl.arange(0, BQ)
    o_key = tl.arange(0, BK)
    stride_out = heads * P
    begin = first + chunk * BQ
    left = count - chunk * BQ
    p_angles = angles_at(table, begin, HALF)
    p_rotated = rotated + (begin * heads + head) * BP
    if ROTATED:
        b_q = load_rows(p_rotated, o_query, left, heads * BP, BP, BP)
    else:
        b_q = load_rotated(q + begin * stride + head * stride_head, p_angles, o_query, left, stride, BQ, HALF, BH)
        store_rows(p_rotated, b_q, o_query, left, heads * BP, BP, BP)
    b_go = load_rows(grad_out + begin * stride_out + head * P, o_query, left, stride_out, P, BP)
    b_out = load_rows(out + begin * stride_out + head * P, o_query, left, stride_out, P, BP)
    b_delta = tl.sum(b_go.to(tl.float32) * b_out.to(tl.float32), 1)
    row = head.to(tl.int64) * tokens + begin
    tl.store(delta + row + o_query, b_delta, mask=o_query < left)
    b_lse = tl.load(lse + row + o_query, mask=o_query < left, other=float("inf"))
    if DROPOUT:
        keys = mask_keys(seed, site, sequence, first_head + head)
    b_gq = tl.zeros([BQ, BP], tl.float32)
    p_k = k + first * stride + head * stride_head
    if ROTATED:
        p_k = rotated + ((tokens + first) * heads + head) * BP
    p_v = v + first * stride + head * stride_head
    p_key_angles = angles_at(table, first, HALF)
    for key in range(0, count, BK):
        if ROTATED:
            b_k = load_rows(p_k, o_key, count - key, heads * BP, BP, BP)
        else:
            b_k = load_rotated(p_k, p_key_angles, o_key, count - key, stride, BK, HALF, BH)
        b_v = load_rows(p_v, o_key, count - key, stride, P, BP)
        b_score = product(b_q, tl.trans(b_k), tl.zeros([BQ, BK], tl.float32))
        b_weight = tl.exp2(b_score * scale - b_lse[:, None])
        if key + BK > count:
            b_weight = tl.where((o_key < count - key)[None, :], b_weight, 0.0)
        b_grad = product(b_go, tl.trans(b_v), tl.zeros([BQ, BK], tl.float32))
        if DROPOUT:
            kept = keeps(keys, (chunk * BQ + o_query)[:, None], key, o_key[None, :], dropped)
            b_grad = tl.where(kept, b_grad * dropout_scale, 0.0)
        b_grad = (b_weight * (b_grad - b_delta[:, None])).to(b_v.dtype)
        b_gq = product(b_grad, b_k, b_gq)
        p_k += BK * (heads * BP if ROTATED else stride)
        p_v += BK * stride
        p_key_angles = angles_at(p_key_angles, BK, HALF)
    p_gq = grad_q + begin * stride_grad + head * stride_grad_head
    p_sums = table  # not written to without SUMS
    if SUMS:
        p_sums = sums_of_tile(sums, begin, sequence, head, heads, slot_rows, P)
    store_rotated_back(p_gq, p_angles, p_sums, b_gq * grad_scale, o_query, left, stride_grad, BQ, HALF, BH, SUMS)


@triton.jit(do_not_specialize=["first_head", "site", "dropped", "lower", "upper"])
def backward_keys(
    rotated, k, v, table, cu_seqlens, grad_out, lse, delta,  # rotated and delta as `backward_queries` left them
    grad_k, grad_v, sums,
    tokens, sequences, heads, chunks, lower, upper, stride, stride_head, stride_grad, stride_grad_head,
    slot_rows, scale, grad_scale, first_head, seed, site, dropped, dropout_scale, opaque_zero,
    P: tl.constexpr, HALF: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, DROPOUT: tl.constexpr, TAIL: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """One program: grad k and grad v of BK keys of one sequence and head."""
    sequence, head, chunk, first = tile_of_program(cu_seqlens, sequences, heads, chunks)
    grad_head = head * stride_grad_head
    if TAIL:
        if sequence == sequences:
            zero_tail(grad_k + grad_head, first, tokens, chunk, chunks, stride_grad, P, BP, BK)
            zero_tail(grad_v + grad_head, first, tokens, chunk, chunks, stride_grad, P, BP, BK)
            return
    count = (tl.load(cu_seqlens + sequence + 1) - first).to(tl.int32)
    if count <= lower or count > upper or chunk * BK >= count:
        return
    o_query = tl.arange(0, BQ)
    o_key = tl.arange(0, BK)
    stride_out = heads * P
    begin = first + chunk * BK
    left = count - chunk * BK
    p_key_angles = angles_at(table, begin, HALF)
    b_k = load_rotated(k + begin * stride + head * stride_head, p_key_angles, o_key, left, stride, BK, HALF, BH)
    b_v = load_rows(v + begin * stride + head * stride_head, o_key, left, stride, P, BP)
    b_gk = tl.zeros([BK, BP], tl.float32)
    b_gv = tl.zeros([BK, BP], tl.float32)
    if DROPOUT:
        keys = mask_keys(seed, site, sequence, first_head + head)
    p_q = rotated + (first * heads + head) * BP
    p_go = grad_out + first * stride_out + head * P
    p_lse = lse + head.to(tl.int64) * tokens + first
    p_delta = delta + head.to(tl.int64) * tokens + first
    for query in range(0, count, BQ):
        b_q = load_rows(p_q, o_query, count - query, heads * BP, BP, BP)
        b_go = load_rows(p_go, o_query, count - query, stride_out, P, BP)
        b_lse = tl.load(p_lse + o_query, mask=o_query < count - query, other=float("inf"))
        b_delta = tl.load(p_delta + o_query, mask=o_query < count - query, other=0.0)
        b_score = product(b_k, tl.trans(b_q), tl.zeros([BK, BQ], tl.float32))
        b_weight = tl.exp2(b_score * scale - b_lse[None, :])
        b_grad = product(b_v, tl.trans(b_go), tl.zeros([BK, BQ], tl.float32))
        b_used = b_weight
        if DROPOUT:
            kept = keeps(keys, (query + o_query)[None, :], chunk * BK, o_key[:, None], dropped)
            b_used = tl.where(kept, b_weight, opaque_zero)
            b_grad = tl.where(kept, b_grad * dropout_scale, 0.0)
        b_grad = (b_weight * (b_grad - b_delta[None, :])).to(b_v.dtype)
        b_gv = product(b_used.to(b_v.dtype), b_go, b_gv)
        b_gk = product(b_grad, b_q, b_gk)
        p_q += BQ * heads * BP
        p_go += BQ * stride_out
        p_lse += BQ
        p_delta += BQ
    p_gk = grad_k + begin * stride_grad + grad_head
    p_gv = grad_v + begin * stride_grad + grad_head
    p_sums = table  # not written to without SUMS
    if SUMS:
        p_sums = sums_of_tile(sums, begin, sequence, head, heads, slot_rows, P)
    b_gv *= dropout_scale
    store_rows(p_gv, b_gv, o_key, left, stride_grad, P, BP)
    if SUMS:
        store_sums(p_sums + 2 * P, b_gv, o_key, left, P, BP)
    store_rotated_back(
        p_gk, p_key_angles, p_sums + P, b_gk * grad_scale, o_key, left, stride_grad, BK, HALF, BH, SUMS)
