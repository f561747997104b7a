"""Rotate queries and keys by their angles once, for sequences whose tiles are read many times."""

import triton
import triton.language as tl

from exlm_dist.kernels.attention.triton.tiles import angles_at, load_rotated, store_rows


@triton.jit
def rotate(
    first, second,  # [T, H, P] in, strides (stride, stride_head, 1): the keys, or queries and keys
    table,  # cosines and sines, as in `forward`
    rotated,  # [1 or 2, T, H, BP] out
    tokens, heads, stride, stride_head,
    P: tl.constexpr, HALF: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens of one head of one operand."""
    head, operand = tl.program_id(1) % heads, tl.program_id(1) // heads
    begin = tl.program_id(0).to(tl.int64) * ROWS
    o_row = tl.arange(0, ROWS)
    left = (tokens - begin).to(tl.int32)
    source = first
    if operand == 1:
        source = second
    p_source = source + begin * stride + head * stride_head
    b_rotated = load_rotated(p_source, angles_at(table, begin, HALF), o_row, left, stride, ROWS, HALF, BH)
    p_rotated = rotated + ((operand.to(tl.int64) * tokens + begin) * heads + head) * BP
    store_rows(p_rotated, b_rotated, o_row, left, heads * BP, BP, BP)
