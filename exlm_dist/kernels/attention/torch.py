"""`attention` tuned in plain torch, what a CPU runs: sequence by sequence in the cache of a core, and the attention
weights computed again in the backward pass instead of stored. (The definition is `naive.py`.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from exlm_dist.kernels.attention.mask import DropoutMask
from exlm_dist.kernels.checks import work_dtype
from exlm_dist.kernels.randomness import site_seed

# Attention weights worked on at a time, in elements: few enough to stay in the cache of a CPU core.
BLOCK_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class _Block:
    """Sequences handled at once: rows `[start, stop)` of the batch, `count` sequences padded to `length`."""

    start: int
    stop: int
    count: int
    length: int
    index: Tensor | None  # [count, length] rows to read; None: exactly the rows start..stop-1
    valid: Tensor | None  # [count, length] bool; None: all


def attention(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor, cu_tokens: Tensor, max_tokens: int, mask: DropoutMask
) -> Tensor:
    """See `exlm_dist.kernels.attention.attention`."""
    return _Attention.apply(q, k, v, angles, cu_tokens, max_tokens, mask)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, angles, cu_tokens, max_tokens, mask):
        ctx.save_for_backward(q, k, v, angles, cu_tokens)
        ctx.settings = (max_tokens, mask)
        dropout = _Dropout(mask, q)
        rotation = _Rotation(angles, work_dtype(q), q.shape[-1] ** -0.5)
        out = _Output(q)
        for block in _blocks(cu_tokens, max_tokens, mask.all_heads):
            weights = _weights(rotation.query(_read(q, block), block), rotation.key(_read(k, block), block), block)
            kept = dropout.draw(weights)
            if kept is not None:
                weights.mul_(kept)
            out.write(block, _multiply(weights, _read(v, block)))
        return out.packed(dropout.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        q, k, v, angles, cu_tokens = ctx.saved_tensors
        max_tokens, mask = ctx.settings
        dropout = _Dropout(mask, q)
        rotation = _Rotation(angles, work_dtype(q), q.shape[-1] ** -0.5)
        grads = _Output(q), _Output(k), _Output(v)
        for block in _blocks(cu_tokens, max_tokens, mask.all_heads):
            query, key = rotation.query(_read(q, block), block), rotation.key(_read(k, block), block)
            value, grad = _read(v, block), _read(grad_out, block)
            weights = _weights(query, key, block)
            kept = dropout.draw(weights)
            grad_scores, grad_value = _back_through_weights(weights, kept, value, grad)
            grads[0].write(block, rotation.back_query(_multiply(grad_scores, key), block))
            grads[1].write(block, rotation.back_key(_multiply(grad_scores.mT, query), block))
            grads[2].write(block, grad_value)
        return *(grad.packed(dropout.scale) for grad in grads), *[None] * 4


def _back_through_weights(weights: Tensor, kept: Tensor | None, value: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the scores and the values from that of the output; `weights` is overwritten."""
    grad_weights = _multiply(grad, value.mT)
    if kept is not None:
        grad_weights.mul_(kept)
    grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    if kept is not None:
        weights.mul_(kept)
    return grad_scores, _multiply(weights.mT, grad)


def _blocks(cu_tokens: Tensor, max_tokens: int, heads: int) -> Iterator[_Block]:
    """Sequences in order, neighbours of equal length in one block; on CUDA all padded to `max_tokens` (no sync)."""
    if cu_tokens.device.type != "cpu":
        yield _padded_block(cu_tokens, max_tokens)
        return
    starts = cu_tokens.tolist()
    first = 0
    while first < len(starts) - 1:
        length = starts[first + 1] - starts[first]
        limit = first + max(1, BLOCK_ELEMENTS // max(1, heads * length * length))
        last = first + 1
        while last < min(limit, len(starts) - 1) and starts[last + 1] - starts[last] == length:
            last += 1
        if length:
            yield _Block(starts[first], starts[last], last - first, length, None, None)
        first = last


def _padded_block(cu_tokens: Tensor, length: int) -> _Block:
    """All sequences padded to `length`; positions past the end of a sequence read the first row."""
    starts, stops = cu_tokens[:-1, None], cu_tokens[1:, None]
    index = starts + torch.arange(length, device=cu_tokens.device)
    valid = index < stops
    return _Block(0, 0, len(starts), length, torch.where(valid, index, 0), valid)


def _read(rows: Tensor, block: _Block) -> Tensor:
    """Rows [T, H, P] of a block as [count, H, length, P] in the working type; padding gives 0."""
    if block.index is None:
        part = rows[block.start : block.stop].unflatten(0, (block.count, block.length))
    else:
        part = rows[block.index].masked_fill(~block.valid[:, :, None, None], 0)
    return part.transpose(1, 2).to(work_dtype(rows))


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product of the last two dimensions of [count, H, ...]."""
    return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).unflatten(0, left.shape[:2])


def _weights(query: Tensor, key: Tensor, block: _Block) -> Tensor:
    """softmax(query key^T) [count, H, length, length]."""
    scores = _multiply(query, key.mT)
    if block.valid is not None:
        scores.masked_fill_(~block.valid[:, None, None, :], float("-inf"))
    return torch.softmax(scores, dim=-1)


class _Output:
    """A packed result [T, H, P], zero where no sequence writes."""

    def __init__(self, like: Tensor) -> None:
        self._rows = like.new_zeros((len(like) + 1, *like.shape[1:]))  # the last row takes what padding writes

    def write(self, block: _Block, part: Tensor) -> None:
        """Write [count, H, length, P] to the rows of the block."""
        part = part.transpose(1, 2)
        if block.index is None:
            self._rows[block.start : block.stop].unflatten(0, (block.count, block.length)).copy_(part)
        else:
            index = torch.where(block.valid, block.index, len(self._rows) - 1)
            self._rows[index] = part.to(self._rows.dtype)

    def packed(self, scale: float) -> Tensor:
        """The rows times `scale`."""
        rows = self._rows[:-1]
        return rows if scale == 1.0 else rows.mul_(scale)


class _Rotation:
    """Rotates queries and keys by their angles, and gradients back; the query also takes the scale of the softmax."""

    def __init__(self, angles: Tensor, dtype: torch.dtype, scale: float) -> None:
        angles = angles.to(dtype)[:, None]
        self._cos, self._sin = torch.cos(angles), torch.sin(angles)
        self._scaled = self._cos * scale, self._sin * scale

    def query(self, part: Tensor, block: _Block) -> Tensor:
        """Rotated and scaled query [count, H, length, P]."""
        return self._rotate(part, *self._scaled, 1, block)

    def key(self, part: Tensor, block: _Block) -> Tensor:
        """Rotated key."""
        return self._rotate(part, self._cos, self._sin, 1, block)

    def back_query(self, grad: Tensor, block: _Block) -> Tensor:
        """Gradient of the query before rotation and scaling."""
        return self._rotate(grad, *self._scaled, -1, block)

    def back_key(self, grad: Tensor, block: _Block) -> Tensor:
        """Gradient of the key before rotation."""
        return self._rotate(grad, self._cos, self._sin, -1, block)

    @staticmethod
    def _rotate(part: Tensor, cos: Tensor, sin: Tensor, sign: int, block: _Block) -> Tensor:
        """[x1 cos - x2 sin, x2 cos + x1 sin] with the halves x1, x2; sign -1 rotates back."""
        cos, sin = _read(cos, block), _read(sin, block)
        first, second = part.chunk(2, dim=-1)
        out = torch.empty(part.shape, dtype=part.dtype, device=part.device)
        low, high = out.chunk(2, dim=-1)
        torch.mul(first, cos, out=low).addcmul_(second, sin, value=-sign)
        torch.mul(second, cos, out=high).addcmul_(first, sin, value=sign)
        return out


class _Dropout:
    """Masks of attention weights drawn in block order from one generator, so that backward draws the same ones.

    16 random bits per weight: the fraction kept is a multiple of 2^-16 and the scale is its exact inverse. The numbers
    of all heads of the layer are drawn and those of other ranks discarded, so a head has one mask on whichever rank.
    """

    def __init__(self, mask: DropoutMask, query: Tensor) -> None:
        self._dropped = min(round(mask.probability * 65536), 65535)
        self.scale = 65536 / (65536 - self._dropped)
        self._all, self._heads = mask.all_heads, slice(mask.first_head, mask.first_head + query.shape[1])
        self._generator = None
        if self._dropped:
            self._generator = torch.Generator(query.device).manual_seed(site_seed(mask.seed, mask.site))

    def draw(self, weights: Tensor) -> Tensor | None:
        """Bool mask of the weights that are kept, shaped as `weights`; None if none are dropped."""
        if self._generator is None:
            return None
        shape = (len(weights), self._all, *weights.shape[2:])
        count = math.prod(shape)
        words = torch.empty(-(-count // 4), dtype=torch.int64, device=weights.device)
        words.random_(-(2**63), None, generator=self._generator)
        return words.view(torch.int16)[:count].view(shape)[:, self._heads] >= self._dropped - 32768
