"""Definition of `attention` in torch: sequence by sequence, weights never stored for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from exlm_dist.kernels.checks import work_dtype

# Attention weights held at a time, in elements: few enough to stay in the cache of a CPU core.
BLOCK_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class _Block:
    """Sequences handled together: rows `[start, stop)` of the batch, `count` sequences padded to `length`."""

    start: int
    stop: int
    count: int
    length: int
    index: Tensor | None  # [count, length] rows to read; None: the rows are exactly start..stop
    valid: Tensor | None  # [count, length] bool; None: all


def attention(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor, cu_tokens: Tensor, max_tokens: int, *, dropout: float, seed: int
) -> Tensor:
    """See `exlm_dist.kernels.attention.attention`."""
    return _Attention.apply(q, k, v, angles, cu_tokens, max_tokens, dropout, seed)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, angles, cu_tokens, max_tokens, dropout, seed):
        ctx.save_for_backward(q, k, v, angles, cu_tokens)
        ctx.settings = (max_tokens, dropout, seed)
        noise = _Dropout(dropout, seed, q.device)
        turn = _Rotation(angles, work_dtype(q), q.shape[-1] ** -0.5)
        out = _Output(q)
        for block in _blocks(cu_tokens, max_tokens, q.shape[1]):
            weights = _weights(turn.query(q, block), turn.key(k, block), block)
            noise.apply(weights)
            out.write(block, torch.bmm(weights, _read(v, block)), scale=noise.scale)
        return out.value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        q, k, v, angles, cu_tokens = ctx.saved_tensors
        max_tokens, dropout, seed = ctx.settings
        noise = _Dropout(dropout, seed, q.device)
        turn = _Rotation(angles, work_dtype(q), q.shape[-1] ** -0.5)
        grad_q, grad_k, grad_v = _Output(q), _Output(k), _Output(v)
        for block in _blocks(cu_tokens, max_tokens, q.shape[1]):
            query, key, value = turn.query(q, block), turn.key(k, block), _read(v, block)
            grad = _read(grad_out, block, scale=noise.scale)
            weights = _weights(query, key, block)
            grad_weights = torch.bmm(grad, value.transpose(1, 2))
            kept = noise.draw(weights)
            if kept is not None:
                grad_weights.mul_(kept)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            if kept is not None:
                weights.mul_(kept)
            grad_v.write(block, torch.bmm(weights.transpose(1, 2), grad))
            grad_q.write(block, turn.back_query(torch.bmm(grad_scores, key), block))
            grad_k.write(block, turn.back_key(torch.bmm(grad_scores.transpose(1, 2), query), block))
        return grad_q.value, grad_k.value, grad_v.value, None, None, None, None, None


def _blocks(cu_tokens: Tensor, max_tokens: int, heads: int) -> Iterator[_Block]:
    """Sequences in order, neighbours of one length together; on CUDA all padded to `max_tokens` (no synchronisation)."""
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
    """All sequences padded to `length`; places past the own end read the first token of the own sequence."""
    starts, stops = cu_tokens[:-1, None], cu_tokens[1:, None]
    index = starts + torch.arange(length, device=cu_tokens.device)
    valid = index < stops
    return _Block(0, 0, len(starts), length, torch.where(valid, index, starts), valid)


def _read(rows: Tensor, block: _Block, scale: float = 1.0) -> Tensor:
    """Rows [T, H, ...] of a block as [count * H, length, ...] in the working type, times `scale`; padding gives 0."""
    if block.index is None:
        part = rows[block.start:block.stop].unflatten(0, (block.count, block.length))
    else:
        part = rows[block.index].masked_fill(~block.valid[:, :, None, None], 0)
    part = part.transpose(1, 2).flatten(0, 1).to(work_dtype(rows))
    return part if scale == 1.0 else part * scale


def _weights(query: Tensor, key: Tensor, block: _Block) -> Tensor:
    """softmax(query key^T) [count * H, length, length]."""
    scores = torch.bmm(query, key.transpose(1, 2))
    if block.valid is not None:
        hidden = ~block.valid[:, None, None, :]
        scores.unflatten(0, (block.count, -1)).masked_fill_(hidden, float("-inf"))
    return torch.softmax(scores, dim=-1)


class _Output:
    """A packed result [T, H, P], zero where no sequence writes."""

    def __init__(self, like: Tensor) -> None:
        self._store = like.new_zeros((len(like) + 1, *like.shape[1:]))  # the last row takes what padding writes
        self.value = self._store[:-1]

    def write(self, block: _Block, part: Tensor, scale: float = 1.0) -> None:
        """Put [count * H, length, P] times `scale` to its rows."""
        part = part.unflatten(0, (block.count, -1)).transpose(1, 2)
        if scale != 1.0:
            part = part * scale
        if block.index is None:
            self.value[block.start:block.stop].unflatten(0, (block.count, block.length)).copy_(part)
            return
        index = torch.where(block.valid, block.index, len(self.value))
        self._store[index] = part.to(self._store.dtype)


class _Rotation:
    """Turns queries and keys by their angles, and gradients back; the softmax scale rides on the query."""

    def __init__(self, angles: Tensor, dtype: torch.dtype, scale: float) -> None:
        angles = angles.to(dtype)
        self._key = torch.cos(angles)[:, None], torch.sin(angles)[:, None]
        self._query = self._key[0] * scale, self._key[1] * scale

    def query(self, rows: Tensor, block: _Block) -> Tensor:
        return self._turn(_read(rows, block), self._query, block)

    def key(self, rows: Tensor, block: _Block) -> Tensor:
        return self._turn(_read(rows, block), self._key, block)

    def back_query(self, grad: Tensor, block: _Block) -> Tensor:
        return self._turn(grad, (self._query[0], -self._query[1]), block)

    def back_key(self, grad: Tensor, block: _Block) -> Tensor:
        return self._turn(grad, (self._key[0], -self._key[1]), block)

    @staticmethod
    def _turn(part: Tensor, table: tuple[Tensor, Tensor], block: _Block) -> Tensor:
        """[x1 cos - x2 sin, x2 cos + x1 sin] of [count * H, length, P] with the halves x1, x2."""
        cos, sin = (_read(entry, block).unflatten(0, (block.count, 1)) for entry in table)
        first, second = part.unflatten(0, (block.count, -1)).chunk(2, dim=-1)
        out = torch.empty(part.shape, dtype=part.dtype, device=part.device)
        low, high = out.unflatten(0, (block.count, -1)).chunk(2, dim=-1)
        torch.mul(first, cos, out=low).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=high).addcmul_(first, sin)
        return out


class _Dropout:
    """Masks of attention weights drawn in block order from one generator, so that backward draws the same ones.

    16 random bits per weight: the share kept is a multiple of 2^-16 and the scale is its exact inverse.
    """

    def __init__(self, share: float, seed: int, device: torch.device) -> None:
        self._dropped = min(round(share * 65536), 65535)
        self.scale = 65536 / (65536 - self._dropped)
        self._generator = None
        if self._dropped:
            self._generator = torch.Generator(device).manual_seed(seed)

    def draw(self, weights: Tensor) -> Tensor | None:
        """Bool mask of the weights that stay, shaped as `weights`; None where nothing is dropped."""
        if self._generator is None:
            return None
        count = weights.numel()
        words = torch.empty(-(-count // 4), dtype=torch.int64, device=weights.device)
        words.random_(-(2**63), None, generator=self._generator)
        return words.view(torch.int16)[:count].view(weights.shape) >= self._dropped - 32768

    def apply(self, weights: Tensor) -> None:
        """Zero the dropped weights in place (the scale is left to the caller)."""
        kept = self.draw(weights)
        if kept is not None:
            weights.mul_(kept)
