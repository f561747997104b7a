"""Forward kernel of attention: tiles of queries, online softmax over the keys."""

import triton
import triton.language as tl

from exlm_dist.kernels.attention.triton.tiles import (
    angles_at,
    keeps,
    load_rotated,
    load_rows,
    mask_keys,
    product,
    store_rows,
    tile_of_program,
    zero_tail,
)


@triton.jit(do_not_specialize=["first_head", "site", "dropped", "lower", "upper"])
def forward(
    q, k, v,  # [T, H, P] in, strides (stride, stride_head, 1)
    rotated,  # [T, H, BP] in: k rotated, where ROTATED
    table,  # in: cosines and sines [T, P] fp32, or [T, HALF] words with a cosine and a sine in fp16
    cu_seqlens,  # [sequences + 1] int64 in
    out,  # [T, H, P] out, contiguous
    lse,  # [H, T] fp32 out: log2 of the sum over the keys of 2^(score * scale)
    tokens, sequences, heads, chunks, lower, upper, stride, stride_head,
    scale, first_head, seed, site, dropped, dropout_scale, opaque_zero,
    P: tl.constexpr, HALF: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr, DROPOUT: tl.constexpr, TAIL: tl.constexpr,
    ROTATED: tl.constexpr,
):  # fmt: skip
    """One program: TILES * BQ queries of one sequence and head, if its length is in (lower, upper]."""
    sequence, head, chunk, first = tile_of_program(cu_seqlens, sequences, heads, chunks)
    stride_out = heads * P
    if TAIL:
        if sequence == sequences:
            zero_tail(out + head * P, first, tokens, chunk, chunks, stride_out, P, BP, BQ)
            return
    count = (tl.load(cu_seqlens + sequence + 1) - first).to(tl.int32)
    if count <= lower or count > upper or chunk * (TILES * BQ) >= count:
        return
    if TILES > 2:
        tl.assume(count > 0)  # without it two more registers, and there are none left
    o_query = tl.arange(0, BQ)
    o_key = tl.arange(0, BK)
    begin = first + chunk * (TILES * BQ)
    left = count - chunk * (TILES * BQ)
    p_q = q + begin * stride + head * stride_head
    p_angles = angles_at(table, begin, HALF)
    b_q, b_sum, b_total, b_top = (), (), (), ()
    for tile in tl.static_range(TILES):
        b_q += (load_rotated(
            p_q + tile * BQ * stride, angles_at(p_angles, tile * BQ, HALF), o_query, left - tile * BQ, stride, BQ, HALF,
            BH),)
        b_sum = b_sum + (tl.zeros([BQ, BP], tl.float32),)
        b_total = b_total + (tl.zeros([BQ], tl.float32),)
        b_top = b_top + (tl.full([BQ], float("-inf"), tl.float32),)
    if DROPOUT:
        keys = mask_keys(seed, site, sequence, first_head + head)
    p_k = k + first * stride + head * stride_head
    if ROTATED:
        p_k = rotated + (first * heads + head) * BP
    p_v = v + first * stride + head * stride_head
    p_angles = angles_at(table, first, HALF)
    for key in range(0, count, BK):
        if ROTATED:
            b_k = load_rows(p_k, o_key, count - key, heads * BP, BP, BP)
        else:
            b_k = load_rotated(p_k, p_angles, o_key, count - key, stride, BK, HALF, BH)
        b_v = load_rows(p_v, o_key, count - key, stride, P, BP)
        n_sum, n_total, n_top = (), (), ()
        for tile in tl.static_range(TILES):
            b_score = product(b_q[tile], tl.trans(b_k), tl.zeros([BQ, BK], tl.float32))
            if key + BK > count:
                b_score = tl.where((o_key < count - key)[None, :], b_score, float("-inf"))
            b_max = tl.maximum(b_top[tile], tl.max(b_score, 1) * scale)
            b_weight = tl.exp2(b_score * scale - b_max[:, None])
            b_shrink = tl.exp2(b_top[tile] - b_max)
            n_top = n_top + (b_max,)
            n_total = n_total + (b_total[tile] * b_shrink + tl.sum(b_weight, 1),)
            if DROPOUT:
                o_row = chunk * (TILES * BQ) + o_query
                kept = keeps(keys, o_row[:, None], key, o_key[None, :], dropped, tile * BQ)
                # three tiles leave no register for `opaque_zero`
                b_weight = tl.where(kept, b_weight, 0.0 if TILES > 2 else opaque_zero)
            n_sum = n_sum + (product(b_weight.to(b_v.dtype), b_v, b_sum[tile] * b_shrink[:, None]),)
        b_sum, b_total, b_top = n_sum, n_total, n_top
        p_k += BK * (heads * BP if ROTATED else stride)
        p_v += BK * stride
        p_angles = angles_at(p_angles, BK, HALF)
    p_out = out + begin * stride_out + head * P
    p_lse = lse + head.to(tl.int64) * tokens + begin
    for tile in tl.static_range(TILES):
        b_out = b_sum[tile] * (dropout_scale / b_total[tile])[:, None]
        store_rows(p_out + tile * BQ * stride_out, b_out, o_query, left - tile * BQ, stride_out, P, BP)
        o_row = tile * BQ + o_query
        tl.store(p_lse + o_row, b_top[tile] + tl.log2(b_total[tile]), mask=o_row < left)
