"""`attention` tuned in plain torch, what a CPU runs: sequence by sequence in the cache of a core, and the attention
weights computed again in the backward pass instead of stored. (The definition is `naive.py`.)

All is read and written by column, [..., T] with neighbouring tokens side by side: the rotation runs along stretches of
tokens, and the columns of a sequence go into a matrix product as they lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from exlm_dist.kernels.attention.mask import DropoutMask
from exlm_dist.kernels.checks import work_dtype
from exlm_dist.kernels.randomness import site_seed

#: Attention weights whose dropout is drawn at a time, in elements: few enough to stay in the cache of a CPU core.
BLOCK_ELEMENTS = 1 << 19
#: Tokens rotated at a time, likewise.
_ROTATED = 1 << 10


def attention(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor, cu_tokens: Tensor, max_tokens: int, mask: DropoutMask
) -> Tensor:
    """See `exlm_dist.kernels.attention.attention`."""
    return attention_packed(torch.stack([q, k, v], 2), None, angles, cu_tokens, max_tokens, mask)


def attention_packed(
    qkv: Tensor, bias: Tensor | None, angles: Tensor, cu_tokens: Tensor, max_tokens: int, mask: DropoutMask
) -> Tensor:
    """See `exlm_dist.kernels.attention.attention_packed`. The result and the gradient of qkv are contiguous by column
    ([H, P, T] and [H, 3, P, T]); a qkv that is not is copied."""
    return _Attention.apply(qkv, bias, angles, cu_tokens, max_tokens, mask)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, bias, angles, cu_tokens, max_tokens, mask):
        columns = _by_column(qkv)
        ctx.save_for_backward(columns, angles, cu_tokens)
        ctx.settings = (max_tokens, mask, None if bias is None else bias.shape)
        dropout = _Dropout(mask, columns)
        rotated = _Rotation(angles, columns).rotated(columns[:, :2])
        out = torch.empty_like(columns[:, 0], memory_format=torch.contiguous_format)
        for piece, kept in _pieces(_blocks(cu_tokens, max_tokens, mask.all_heads), dropout):
            weights = _weights(rotated, piece)
            if kept is not None:
                weights.mul_(kept)
            piece.write(out, torch.bmm(piece.read(columns[:, 2]), weights.mT))
        return _finished(out, cu_tokens, dropout.scale).permute(2, 0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        columns, angles, cu_tokens = ctx.saved_tensors
        max_tokens, mask, bias_shape = ctx.settings
        dropout, rotation = _Dropout(mask, columns), _Rotation(angles, columns)
        rotated = rotation.rotated(columns[:, :2])
        grad_out = _by_column(grad_out)
        grads = torch.empty_like(columns)
        for piece, kept in _pieces(_blocks(cu_tokens, max_tokens, mask.all_heads), dropout):
            query, key = (piece.read(rotated[:, i]) for i in (0, 1))
            value, grad = piece.read(columns[:, 2]), piece.read(grad_out)
            weights, grad_weights = _weights(rotated, piece), torch.bmm(grad.mT, value)
            if kept is not None:
                grad_weights.mul_(kept)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            if kept is not None:
                weights.mul_(kept)
            piece.write(grads[:, 2], torch.bmm(grad, weights))
            grad_query, grad_key = torch.bmm(key, grad_scores.mT), torch.bmm(query, grad_scores)
            piece.write(rotated[:, 0], grad_query)  # where query and key were, which nothing else reads
            piece.write(rotated[:, 1], grad_key)
        rotation.rotate_back(rotated, grads[:, :2])
        grads = _finished(grads, cu_tokens, dropout.scale)
        grad_bias = None if bias_shape is None else grads.sum(-1).view(bias_shape)
        return grads.permute(3, 0, 1, 2), grad_bias, *[None] * 4


def _by_column(rows: Tensor) -> Tensor:
    """Rows [T, ...] as contiguous columns [..., T]."""
    return rows.flatten(1).t().contiguous().unflatten(0, rows.shape[1:])


def _weights(rotated: Tensor, piece: _Piece) -> Tensor:
    """softmax(query key^T) [N, length, length] of the rotated columns [H, 2, P, T] of a piece."""
    scores = torch.bmm(piece.read(rotated[:, 0]).mT, piece.read(rotated[:, 1]))
    if piece.valid is not None:
        scores.masked_fill_(~piece.valid.repeat_interleave(len(rotated), 0)[:, None], float("-inf"))
    return torch.softmax(scores, dim=-1)


def _finished(columns: Tensor, cu_tokens: Tensor, scale: float) -> Tensor:
    """Columns [..., T] times `scale`, 0 past the last sequence."""
    if cu_tokens.device.type == "cpu":
        columns[..., int(cu_tokens[-1]) :] = 0
    else:  # without waiting for the device
        columns.masked_fill_(torch.arange(columns.shape[-1], device=columns.device) >= cu_tokens[-1], 0)
    return columns if scale == 1.0 else columns.mul_(scale)


@dataclass(frozen=True)
class _Block:
    """Neighbours whose dropout is drawn at once: `count` sequences of `length` tokens, the first token being `start`.

    With `index` they are padded to that length: [count, length], the tokens to read, and which of them are `valid`.
    """

    start: int
    count: int
    length: int
    index: Tensor | None = None
    valid: Tensor | None = None


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
            yield _Block(starts[first], last - first, length)
        first = last


def _padded_block(cu_tokens: Tensor, length: int) -> _Block:
    """All sequences padded to `length`; positions past the end of a sequence read the first token."""
    starts, stops = cu_tokens[:-1, None], cu_tokens[1:, None]
    index = starts + torch.arange(length, device=cu_tokens.device)
    valid = index < stops
    return _Block(0, len(starts), length, torch.where(valid, index, 0), valid)


@dataclass(frozen=True)
class _Piece:
    """What goes into one batched product: the tokens of one sequence, or of all in a padded block."""

    tokens: slice | Tensor
    valid: Tensor | None

    def read(self, columns: Tensor) -> Tensor:
        """Columns [H, P, T] of the piece as [N, P, length] in the working type; padding gives 0."""
        part = columns[..., self.tokens]
        if self.valid is not None:
            part = part.masked_fill(~self.valid, 0).permute(2, 0, 1, 3).flatten(0, 1)
        return part.to(work_dtype(columns))

    def write(self, columns: Tensor, part: Tensor) -> None:
        """Write [N, P, length] to the columns of the piece."""
        if self.valid is None:
            columns[..., self.tokens] = part
            return
        wide = F.pad(columns, (0, 1))  # the last column takes what padding writes
        tokens = torch.where(self.valid, self.tokens, columns.shape[-1])
        wide[..., tokens] = part.unflatten(0, (-1, len(columns))).permute(1, 2, 0, 3).to(columns.dtype)
        columns.copy_(wide[..., :-1])


def _pieces(blocks: Iterator[_Block], dropout: _Dropout) -> Iterator[tuple[_Piece, Tensor | None]]:
    """Each piece, and its factors 0 or 1 of the weights, [N, length, length] or None."""
    for block in blocks:
        kept = dropout.draw(block.count, block.length)
        if block.index is not None:
            yield _Piece(block.index, block.valid), None if kept is None else kept.flatten(0, 1)
            continue
        for i in range(block.count):
            start = block.start + i * block.length
            yield _Piece(slice(start, start + block.length), None), None if kept is None else kept[i]


class _Rotation:
    """Rotates queries and keys by their angles, and gradients back; the query also takes the scale of the softmax."""

    def __init__(self, angles: Tensor, columns: Tensor) -> None:
        angles = angles.t().to(work_dtype(columns)).contiguous()
        scales = angles.new_tensor([columns.shape[2] ** -0.5, 1.0])[:, None, None]
        self._cos, self._sin = torch.cos(angles) * scales, torch.sin(angles) * scales  # [2, P/2, T]

    def rotated(self, columns: Tensor) -> Tensor:
        """Rotated and scaled queries and rotated keys, both [H, 2, P, T], from such."""
        out = columns.new_empty(columns.shape, dtype=self._cos.dtype)
        self._rotate(columns, 1, out)
        return out

    def rotate_back(self, grads: Tensor, out: Tensor) -> None:
        """Write to `out` the gradients before rotation and scaling, [H, 2, P, T]."""
        self._rotate(grads, -1, out)

    def _rotate(self, columns: Tensor, sign: int, out: Tensor) -> None:
        """[x1 cos - x2 sin, x2 cos + x1 sin] with the halves x1, x2; sign -1 rotates back."""
        for x, cos, sin, place in zip(*(tensor.split(_ROTATED, -1) for tensor in (columns, self._cos, self._sin, out))):
            target = place if place.dtype == cos.dtype else torch.empty_like(place, dtype=cos.dtype)
            (first, second), (low, high) = x.to(cos.dtype).chunk(2, dim=2), target.chunk(2, dim=2)
            torch.mul(first, cos, out=low).addcmul_(second, sin, value=-sign)
            torch.mul(second, cos, out=high).addcmul_(first, sin, value=sign)
            if target is not place:
                place.copy_(target)


class _Dropout:
    """Masks of attention weights drawn in block order from one generator, so that backward draws the same ones.

    16 random bits per weight: the fraction kept is a multiple of 2^-16 and the scale is its exact inverse. The numbers
    of all heads of the layer are drawn and those of other ranks discarded, so a head has one mask on whichever rank.
    """

    def __init__(self, mask: DropoutMask, columns: Tensor) -> None:
        self._dropped = min(round(mask.probability * 65536), 65535)
        self.scale = 65536 / (65536 - self._dropped)
        self._all, self._heads = mask.all_heads, slice(mask.first_head, mask.first_head + len(columns))
        self._device, self._dtype = columns.device, work_dtype(columns)
        self._generator = None
        if self._dropped:
            self._generator = torch.Generator(columns.device).manual_seed(site_seed(mask.seed, mask.site))

    def draw(self, count: int, length: int) -> Tensor | None:
        """1 for the weights that are kept, 0 for the others, [count, H, length, length]; None if none are dropped."""
        if self._generator is None:
            return None
        shape = (count, self._all, length, length)
        size = math.prod(shape)
        words = torch.empty(-(-size // 4), dtype=torch.int64, device=self._device)
        words.random_(-(2**63), None, generator=self._generator)
        # As whole numbers: a comparison to bool, and bool to a float, take five times as long.
        kept = words.view(torch.int16)[:size].view(shape)[:, self._heads].ge_(self._dropped - 32768)
        return kept.to(self._dtype)
