"""What the attention kernels have in common: tiles of rows, rotary positions, the work of a program, dropout words.

Letters: T tokens, H heads, P head width; a tile has BQ queries or BK keys. Names: o_ offsets, p_ pointers, b_ loaded
tile. q and k are read as two halves of P/2, so that rotating them needs no shuffle.
"""

import triton
import triton.language as tl

from exlm_dist.kernels.randomness.triton import extended, key_of


@triton.jit
def mask_keys(seed, site, sequence, head):
    """Two words that decide the mask of one sequence and head; `head` is the head's index in the whole layer, whichever
    rank it is local to."""
    key = extended(extended(key_of(seed, site), sequence), head)
    return key, extended(key, tl.full([], 1, tl.uint32))


@triton.jit
def keeps(keys, o_query, key, o_key, dropped, QUERY: tl.constexpr = 0):
    """Whether the weights (QUERY + o_query, key + o_key) are kept, `key` being a multiple of 16: 16 random bits each
    against `dropped`, which is shifted up by 16 and then reinterpreted as signed.

    One word serves the two keys whose indices differ in bit 3. Tensor cores give both to the same thread (as columns
    and as rows), so the compiler finds that the two words are equal and hashes half as often.
    """
    counter = keys[0] + (o_query.to(tl.uint32) << 16) + (key >> 1)
    counter += (o_key // 16 * 8 + o_key % 8 + (QUERY << 16)).to(tl.uint32)
    word = (counter ^ (counter >> 16)) * tl.full([], 0x7FEB352D, tl.uint32)
    word = (word ^ (word >> 15) ^ keys[1]) * tl.full([], 0x846CA68B, tl.uint32)
    word = tl.where((o_key & 8) != 0, word + (word << 16), word)
    return word >= tl.cast(dropped, tl.uint32, bitcast=True)


@triton.jit
def load_rows(p_base, o_row, limit, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Tile [rows, BLOCK]: WIDTH columns of the rows below `limit`, 0 elsewhere."""
    o_column = tl.arange(0, BLOCK)
    inside = (o_row < limit)[:, None]
    if BLOCK != WIDTH:
        inside = inside & (o_column < WIDTH)[None, :]
    return tl.load(p_base + o_row[:, None] * stride + o_column[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(p_base, b_tile, o_row, limit, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write the rows below `limit` of a tile [rows, BLOCK], WIDTH columns."""
    o_column = tl.arange(0, BLOCK)
    inside = (o_row < limit)[:, None]
    if BLOCK != WIDTH:
        inside = inside & (o_column < WIDTH)[None, :]
    tl.store(p_base + o_row[:, None] * stride + o_column[None, :], b_tile.to(p_base.dtype.element_ty), mask=inside)


@triton.jit
def angles_at(table, row, HALF: tl.constexpr):
    """Pointer to the table's angles of the token that is `row` rows further on."""
    if table.dtype.element_ty == tl.int32:
        return table + row * HALF
    return table + row * (2 * HALF)


@triton.jit
def load_angles(p_table, o_row, limit, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Cosines and sines [rows, BLOCK] in fp32 of the rows below `limit`, from fp32 or from two fp16 in one word."""
    if p_table.dtype.element_ty == tl.int32:
        b_both = load_rows(p_table, o_row, limit, HALF, HALF, BLOCK)
        b_cos = b_both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        b_sin = (b_both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        b_cos = load_rows(p_table, o_row, limit, 2 * HALF, HALF, BLOCK)
        b_sin = load_rows(p_table + HALF, o_row, limit, 2 * HALF, HALF, BLOCK)
    return b_cos, b_sin


@triton.jit
def load_rotated(p_base, p_table, o_row, limit, stride, ROWS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of q or k rotated by their angles: [ROWS, 2 * BLOCK], the second half from column BLOCK on."""
    b_first = load_rows(p_base, o_row, limit, stride, HALF, BLOCK)
    b_second = load_rows(p_base + HALF, o_row, limit, stride, HALF, BLOCK)
    b_cos, b_sin = load_angles(p_table, o_row, limit, HALF, BLOCK)
    b_low = (b_first.to(tl.float32) * b_cos - b_second.to(tl.float32) * b_sin).to(b_first.dtype)
    b_high = (b_second.to(tl.float32) * b_cos + b_first.to(tl.float32) * b_sin).to(b_first.dtype)
    return tl.reshape(tl.permute(tl.join(b_low, b_high), (0, 2, 1)), [ROWS, 2 * BLOCK])


@triton.jit
def store_sums(p_sums, b_tile, o_row, limit, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write the sums over the rows below `limit` of a tile [rows, BLOCK], WIDTH of them."""
    o_column = tl.arange(0, BLOCK)
    b_sum = tl.sum(tl.where((o_row < limit)[:, None], b_tile, 0.0), 0)
    tl.store(p_sums + o_column, b_sum, mask=o_column < WIDTH)


@triton.jit
def store_rotated_back(
    p_base, p_table, p_sums, b_grad, o_row, limit, stride,
    ROWS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Write the gradient [ROWS, 2 * BLOCK] of q or k, rotated by minus the angles, and with SUMS its sums over rows."""
    b_low, b_high = tl.split(tl.permute(tl.reshape(b_grad, [ROWS, 2, BLOCK]), (0, 2, 1)))
    b_cos, b_sin = load_angles(p_table, o_row, limit, HALF, BLOCK)
    b_first = b_low * b_cos + b_high * b_sin
    b_second = b_high * b_cos - b_low * b_sin
    store_rows(p_base, b_first, o_row, limit, stride, HALF, BLOCK)
    store_rows(p_base + HALF, b_second, o_row, limit, stride, HALF, BLOCK)
    if SUMS:
        store_sums(p_sums, b_first, o_row, limit, HALF, BLOCK)
        store_sums(p_sums + HALF, b_second, o_row, limit, HALF, BLOCK)


@triton.jit
def product(b_left, b_right, b_sum):
    """b_sum + b_left @ b_right in fp32 (fp32 operands are not rounded to TF32)."""
    return tl.dot(b_left, b_right, b_sum, input_precision="ieee")


@triton.jit
def tile_of_program(cu_seqlens, sequences, heads, chunks):
    """The work of this program: (sequence, head, chunk, first token); sequence == `sequences` is the padding."""
    program = tl.program_id(0)
    chunk = program % chunks
    head = (program // chunks) % heads
    sequence = program // chunks // heads
    first = tl.load(cu_seqlens + sequence)
    return sequence, head, chunk, first


@triton.jit
def zero_tail(
    p_out, first, tokens, chunk, chunks, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """Zero rows `first`.. of one head; they are split among the head's programs by chunk."""
    o_row = tl.arange(0, ROWS)
    for row in range(chunk * ROWS, (tokens - first).to(tl.int32), chunks * ROWS):
        base = p_out + (first + row) * stride
        store_rows(base, tl.zeros([ROWS, BLOCK], tl.float32), o_row, tokens - first - row, stride, WIDTH, BLOCK)


@triton.jit
def sums_of_tile(p_sums, begin, sequence, head, heads, slot_rows, P: tl.constexpr):
    """Slot for the sums of a tile of at least `slot_rows` rows from token `begin` on: no other tile has the same."""
    return p_sums + ((begin // slot_rows + sequence) * heads + head) * 3 * P
