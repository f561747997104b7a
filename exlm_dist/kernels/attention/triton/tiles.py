"""What the attention kernels share: tiles of rows, rotary turning, places in the batch, dropout words.

Letters: T tokens, H heads, P head width; a tile has BQ queries or BK keys. Names: o_ offsets, p_ pointers, b_ loaded
tile. q and k are read as two halves of P/2, so that turning them needs no shuffle.
"""

import triton
import triton.language as tl


@triton.jit
def mixed(x):
    """A 32-bit hash (two multiplications, Wellons' lowbias32): each input bit flips each output bit half the time."""
    x = (x ^ (x >> 16)) * tl.full([], 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def row_keys(seed_low, seed_high, sequence, head, o_query):
    """Start of each query row's stream of random words: a hash of (seed, sequence, head, query); `head` counts all
    heads of the layer, also those that other ranks hold."""
    gamma = tl.full([], 0x9E3779B9, tl.uint32)
    key = mixed(tl.cast(seed_low, tl.uint32, bitcast=True) + gamma)
    key = mixed(key ^ tl.cast(seed_high, tl.uint32, bitcast=True))
    key = mixed(key + sequence.to(tl.uint32) * gamma)
    key = mixed(key + head.to(tl.uint32) * gamma)
    return mixed(key + o_query.to(tl.uint32) * gamma)


@triton.jit
def keeps(b_row_key, o_key, dropped):
    """Whether weight (query, key) stays: word number `key` of the row's stream (splitmix), against dropped / 2^24."""
    word = mixed(b_row_key + o_key.to(tl.uint32) * tl.full([], 0x9E3779B9, tl.uint32))
    return (word >> 8).to(tl.int32) >= dropped


@triton.jit
def load_rows(p_base, o_row, limit, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Tile [rows, BLOCK]: WIDTH columns of the rows below `limit`, else 0."""
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
def load_turned(p_base, p_table, o_row, limit, stride, ROWS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of q or k turned by their angles: [ROWS, 2 * BLOCK], the second half from column BLOCK on."""
    b_first = load_rows(p_base, o_row, limit, stride, HALF, BLOCK)
    b_second = load_rows(p_base + HALF, o_row, limit, stride, HALF, BLOCK)
    b_cos = load_rows(p_table, o_row, limit, 2 * HALF, HALF, BLOCK)
    b_sin = load_rows(p_table + HALF, o_row, limit, 2 * HALF, HALF, BLOCK)
    b_low = (b_first.to(tl.float32) * b_cos - b_second.to(tl.float32) * b_sin).to(b_first.dtype)
    b_high = (b_second.to(tl.float32) * b_cos + b_first.to(tl.float32) * b_sin).to(b_first.dtype)
    return tl.reshape(tl.permute(tl.join(b_low, b_high), (0, 2, 1)), [ROWS, 2 * BLOCK])


@triton.jit
def store_turned_back(
    p_base, p_table, b_grad, o_row, limit, stride, ROWS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the gradient [ROWS, 2 * BLOCK] of q or k: turned by minus the angles."""
    b_low, b_high = tl.split(tl.permute(tl.reshape(b_grad, [ROWS, 2, BLOCK]), (0, 2, 1)))
    b_cos = load_rows(p_table, o_row, limit, 2 * HALF, HALF, BLOCK)
    b_sin = load_rows(p_table + HALF, o_row, limit, 2 * HALF, HALF, BLOCK)
    store_rows(p_base, b_low * b_cos + b_high * b_sin, o_row, limit, stride, HALF, BLOCK)
    store_rows(p_base + HALF, b_high * b_cos - b_low * b_sin, o_row, limit, stride, HALF, BLOCK)


@triton.jit
def product(b_left, b_right, b_sum):
    """b_sum + b_left @ b_right in fp32 (fp32 operands are not rounded to TF32)."""
    return tl.dot(b_left, b_right, b_sum, input_precision="ieee")


@triton.jit
def place(cu, sequences, heads, chunks):
    """What this program works on: (sequence, head, chunk, first token); sequence == `sequences` is the padding."""
    program = tl.program_id(0)
    chunk = program % chunks
    head = (program // chunks) % heads
    sequence = program // chunks // heads
    first = tl.load(cu + sequence)
    return sequence, head, chunk, first


@triton.jit
def zero_tail(
    p_out, first, tokens, chunk, chunks, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """Zero rows `first`.. of one head; the programs of the head share them by chunk."""
    o_row = tl.arange(0, ROWS)
    for row in range(chunk * ROWS, (tokens - first).to(tl.int32), chunks * ROWS):
        base = p_out + (first + row) * stride
        store_rows(base, tl.zeros([ROWS, BLOCK], tl.float32), o_row, tokens - first - row, stride, WIDTH, BLOCK)
