"""Triton form of the vocabulary match: the logits live in registers, or as gradients of one block of rows and chunk of
words at a time.

Forward: each (rows, tile of words) writes its largest logit and sum of exponentials, which a second kernel adds up in a
fixed order; the scores of a sequence's own targets are a small product. Backward: for each chunk of words, and in it
for each block of rows, the logits are computed again and become gradients -Gamma_u p before they leave the registers
(Gamma_u: the incoming gradient summed over the targets), and cuBLAS multiplies them with the weights and the states. At
the targets themselves the gradients are sums over one sequence (for the states) and over equal tokens, sorted (for the
weights). No atomics, no host synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from exlm_dist.config.vocab_tiles import FEW_ROWS, LOGITS, TILE, WORDS_OF_FEW, WORDS_OF_MANY
from exlm_dist.kernels.launch import capability, cdiv, launch
from exlm_dist.kernels.vocab import torch as torch_form
from exlm_dist.kernels.vocab.shard import VocabShard
from exlm_dist.kernels.vocab.triton.backward import (
    logit_gradient_kernel,
    scatter_kernel,
    state_gradient_kernel,
    target_gradient_kernel,
)
from exlm_dist.kernels.vocab.triton.forward import LN2, lse_kernel, match_kernel, partial_sum_kernel


def match_scores(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target_ids: Tensor,
    cu_states: Tensor,
    cu_targets: Tensor,
    max_states: int,
    max_targets: int,
    *,
    shard: VocabShard | None,
) -> Tensor:
    """See `exlm_dist.kernels.vocab.match_scores`."""
    sizes = (max_states, max_targets)
    if hidden.dtype == torch.float64:
        return torch_form.match_scores(hidden, weight, bias, target_ids, cu_states, cu_targets, *sizes, shard=shard)
    return _MatchScores.apply(hidden, weight, bias, target_ids, cu_states, cu_targets, *sizes, shard)


@dataclass(frozen=True)
class Tiles:
    """Sizes of the product states x words, and the block of rows and chunk of words whose gradients are stored at a
    time.
    """

    rows: int
    words: int
    depth: int
    group: int
    warps: int
    stages: int
    block: int
    chunk: int
    precision: str
    descriptors: bool = False

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor) -> Tiles:
        """The measured best for the type and the GPU (benchmarks/results)."""
        chunk = _part(len(weight), WORDS_OF_FEW if len(hidden) <= FEW_ROWS else WORDS_OF_MANY)
        stored = (_part(len(hidden), LOGITS // chunk), chunk)
        if hidden.dtype == torch.float32:
            return cls(64, 64, 32, 8, 4, 2, *stored, _precision(hidden))
        if capability(hidden.device) >= (9, 0):
            # A descriptor needs rows and a start aligned to 16 bytes; a parameter that is a slice of a flat buffer may
            # lack the latter.
            aligned = hidden.shape[1] * hidden.element_size() % 16 == 0
            aligned = aligned and (hidden.data_ptr() | weight.data_ptr()) % 16 == 0
            return cls(128, 128, 64, 8, 4, 3, *stored, _precision(hidden), descriptors=aligned)
        return cls(128, 128, 32, 8, 8, 3, *stored, _precision(hidden))

    def constants(self, width: int) -> dict[str, Any]:
        """Compile-time constants of the kernels that compute logits."""
        return {
            "ROWS": self.rows, "WORDS": self.words, "DEPTH": self.depth, "GROUP": self.group,
            "EVEN": width % self.depth == 0, "DESCRIPTORS": self.descriptors, "PRECISION": self.precision,
        }  # fmt: skip

    def operands(self, hidden: Tensor, weight: Tensor) -> dict[str, Any]:
        """hidden and weight as the kernels take them."""
        if not self.descriptors:
            return {"hidden": hidden, "weight": weight}
        return {
            "hidden": TensorDescriptor.from_tensor(hidden, [self.rows, self.depth]),
            "weight": TensorDescriptor.from_tensor(weight, [self.words, self.depth]),
        }


class _MatchScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target_ids, cu_states, cu_targets, max_states, max_targets, shard):
        hidden, matrix = hidden.contiguous(), weight.to(hidden.dtype).contiguous()
        sequences = {"target_ids": target_ids, "cu_states": cu_states, "cu_targets": cu_targets}
        first_token = shard.first_token if shard else 0
        lse = _lse(hidden, matrix, bias)
        match = torch.empty((len(cu_states) - 1, max_targets, max_states), dtype=torch.float32, device=hidden.device)
        if shard:
            lse = shard.all_reduce_lse(lse.mul_(LN2.value)).div_(LN2.value)
        depth = 32 if hidden.dtype == torch.float32 else 64
        launch(
            match_kernel,
            (cdiv(max_states, depth), cdiv(max_targets, 32), len(cu_states) - 1),
            {"hidden": hidden, "weight": matrix, "bias": bias, **sequences, "lse": lse, "match": match,
             "vocab": len(matrix), "width": hidden.shape[1], "first_token": first_token,
             "max_states": max_states, "max_targets": max_targets, "rest": 0.0 if shard else float("-inf")},
            {"TARGETS": 32, "STATES": depth, "DEPTH": depth, "EVEN": hidden.shape[1] % depth == 0,
             "WHOLE": shard is None, "PRECISION": _precision(hidden)},
        )  # fmt: skip
        if shard:
            match = _minus_lse(shard.all_reduce_sum(match), lse, cu_states, cu_targets)
        ctx.save_for_backward(hidden, matrix, bias, target_ids, cu_states, cu_targets, lse)
        ctx.settings = (first_token, weight.dtype)
        return match

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_match):
        hidden, matrix, bias, target_ids, cu_states, cu_targets, lse = ctx.saved_tensors
        first_token, weight_type = ctx.settings
        grad_match = grad_match.float().contiguous()
        sequences = {"cu_states": cu_states, "cu_targets": cu_targets}
        sizes = {"max_states": grad_match.shape[2], "max_targets": grad_match.shape[1], "count": len(cu_states) - 1}
        grad_hidden, gamma = _at_states(hidden, matrix, target_ids, sequences, grad_match, first_token, sizes)
        grad_weight = torch.empty_like(matrix)
        grad_bias = torch.empty(len(matrix), dtype=torch.float32, device=bias.device)
        _through_softmax(hidden, matrix, bias, lse, gamma, grad_hidden, grad_weight, grad_bias)
        _at_words(hidden, target_ids, sequences, grad_match, first_token, sizes, grad_weight, grad_bias)
        return (
            grad_hidden.to(hidden.dtype), grad_weight.to(weight_type), grad_bias.to(bias.dtype),
            None, None, None, None, None, None,
        )  # fmt: skip


def _precision(hidden: Tensor) -> str:
    """How fp32 operands are multiplied: exactly for fp32 input; else gradients of match need no more than tf32."""
    return "ieee" if hidden.dtype == torch.float32 else "tf32"


def _tile(hidden: Tensor) -> tuple[int, int]:
    """States and columns of the width in a tile of the gradients at the targets."""
    if hidden.dtype == torch.float32:
        return 32, 32
    return 64, 64 if hidden.shape[1] % 64 == 0 else 32


def _lse(hidden: Tensor, weight: Tensor, bias: Tensor, tiles: Tiles | None = None) -> Tensor:
    """log2 of the sum over the words of e^logit, fp32 [S]."""
    tiles = tiles or Tiles.of(hidden, weight)
    rows, width = hidden.shape
    across = cdiv(len(weight), tiles.words)
    top = torch.empty((across, rows), dtype=torch.float32, device=hidden.device)
    total = torch.empty_like(top)
    lse = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    parts = {"top": top, "total": total, "rows": rows, "tiles": across}
    launch(
        partial_sum_kernel,
        (cdiv(rows, tiles.rows) * across,),
        {**tiles.operands(hidden, weight), "bias": bias, **parts, "vocab": len(weight), "width": width},
        tiles.constants(width),
        warps=tiles.warps,
        stages=tiles.stages,
    )
    launch(lse_kernel, (cdiv(rows, 64),), {**parts, "lse": lse}, {"ROWS": 64, "TILES": 32})
    return lse


def _minus_lse(scores: Tensor, lse: Tensor, cu_states: Tensor, cu_targets: Tensor) -> Tensor:
    """scores [B, N, L] summed over the shards, minus the lse of their states; -inf outside own targets and states."""
    targets = torch.arange(scores.shape[1], device=scores.device) < cu_targets.diff()[:, None]
    states = torch.arange(scores.shape[2], device=scores.device) < cu_states.diff()[:, None]
    rows = (cu_states[:-1, None] + torch.arange(scores.shape[2], device=scores.device)).clamp(max=len(lse) - 1)
    inside = targets[:, :, None] & states[:, None, :]
    return torch.where(inside, scores - (lse * LN2.value)[rows][:, None], float("-inf"))


def _at_states(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    sequences: dict[str, Tensor],
    grad_match: Tensor,
    first_token: int,
    sizes: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """Gradient of the states through the targets' scores, fp32 [S, D], and Gamma [S], the sum of grad_match over i."""
    rows, width = hidden.shape
    tile, depth = _tile(hidden)
    grad_hidden = torch.empty((rows, width), dtype=torch.float32, device=hidden.device)
    gamma = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    launch(
        state_gradient_kernel,
        (cdiv(sizes["max_states"], tile), cdiv(width, depth), sizes["count"] + 1),
        {"weight": weight, "target_ids": target_ids, **sequences, "grad_match": grad_match, "gamma": gamma,
         "grad_hidden": grad_hidden, "rows": rows, "vocab": len(weight), "width": width, "first_token": first_token,
         **sizes},
        {"TARGETS": 32, "STATES": tile, "DEPTH": depth, "PRECISION": _precision(hidden)},
    )  # fmt: skip
    return grad_hidden, gamma


def _through_softmax(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    lse: Tensor,
    gamma: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    tiles: Tiles | None = None,
) -> None:
    """Add the gradient through the lse to grad_hidden (fp32), and write it to grad_weight and grad_bias: for each chunk
    of words, one block of rows after another.
    """
    tiles = tiles or Tiles.of(hidden, weight)
    rows, words, width = tiles.block, tiles.chunk, hidden.shape[1]
    buffer = torch.empty(rows * words, dtype=hidden.dtype, device=hidden.device)
    sums = torch.empty((cdiv(rows, tiles.rows), len(weight)), dtype=torch.float32, device=hidden.device)
    whole = rows == len(hidden)
    # The sum over several blocks of rows stays in fp32 until it is complete.
    chunk_sum = None if whole else torch.empty((words, width), dtype=torch.float32, device=hidden.device)
    common = {"bias": bias, "grad_bias": sums, "vocab": len(weight), "width": width}
    blocks = []
    for block, *rest in zip(*(_split(tensor, tiles.block) for tensor in (hidden, lse, gamma, grad_hidden))):
        of_rows = {"lse": rest[0], "gamma": rest[1], "rows": len(block), "accumulate": int(bool(blocks))}
        blocks.append((block, rest[2], {**tiles.operands(block, weight), **common, **of_rows}))
    constants, start, shape = tiles.constants(width), 0, (0, 0)
    for matrix, grad_matrix in zip(_split(weight, tiles.chunk), _split(grad_weight, tiles.chunk)):
        words = len(matrix)
        across = cdiv(words, tiles.words)
        for block, grad_block, arguments in blocks:
            rows = arguments["rows"]
            if shape != (rows, words):  # all blocks and chunks but the last are of one size
                shape = rows, words
                grad = buffer[: rows * words].view(shape)
                transposed = grad.t()
            launch(
                logit_gradient_kernel,
                (cdiv(rows, tiles.rows) * across,),
                {**arguments, "grad": grad, "chunk": words, "start": start},
                constants,
                warps=tiles.warps,
                stages=tiles.stages,
            )
            if chunk_sum is None:
                torch.mm(transposed, block, out=grad_matrix)
            else:
                _add_product(chunk_sum[:words], transposed, block, fresh=not arguments["accumulate"])
            _add_product(grad_block, grad, matrix)
        if chunk_sum is not None:
            grad_matrix.copy_(chunk_sum[:words])
        start += words
    torch.sum(sums, 0, out=grad_bias)


def _part(total: int, most: int) -> int:
    """The total if it is at most `most`; else the size, in whole tiles, of the fewest equal parts that are."""
    tiles = cdiv(total, TILE)
    return total if total <= most else cdiv(tiles, cdiv(tiles, most // TILE)) * TILE


def _split(tensor: Tensor, size: int) -> Sequence[Tensor]:
    """`tensor.split(size)`, without the cost of a view where there is one part."""
    return tensor.split(size) if len(tensor) > size else (tensor,)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, fresh: bool = False) -> None:
    """total (fp32) += left @ right, or = if it is fresh; the sum is in fp32 throughout."""
    beta = 0 if fresh else 1
    if total.device.type == "cpu" or left.dtype == torch.float32:
        total.addmm_(left.float(), right.float(), beta=beta)
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, beta=beta, out=total)


def _at_words(
    hidden: Tensor,
    target_ids: Tensor,
    sequences: dict[str, Tensor],
    grad_match: Tensor,
    first_token: int,
    sizes: dict[str, int],
    grad_weight: Tensor,
    grad_bias: Tensor,
) -> None:
    """Add the gradient through the targets' own scores to the rows of their tokens; each row has one owner, and its sum
    a fixed order.
    """
    width = hidden.shape[1]
    tile, depth = _tile(hidden)
    grad_target = torch.empty((len(target_ids), width), dtype=torch.float32, device=hidden.device)
    grad_target_bias = torch.empty(len(target_ids), dtype=torch.float32, device=hidden.device)
    launch(
        target_gradient_kernel,
        (cdiv(width, depth), cdiv(sizes["max_targets"], 32), sizes["count"]),
        {"hidden": hidden, **sequences, "grad_match": grad_match, "grad_target": grad_target,
         "grad_target_bias": grad_target_bias, "width": width, **sizes},
        {"TARGETS": 32, "STATES": tile, "DEPTH": depth, "PRECISION": _precision(hidden)},
    )  # fmt: skip
    ids, order = torch.sort(target_ids, stable=True)
    launch(
        scatter_kernel,
        (cdiv(width, 256), len(ids)),
        {"ids": ids, "order": order, "cu_targets": sequences["cu_targets"], "grad_target": grad_target,
         "grad_target_bias": grad_target_bias, "grad_weight": grad_weight, "grad_bias": grad_bias, "targets": len(ids),
         "vocab": len(grad_weight), "width": width, "first_token": first_token, "count": sizes["count"]},
        {"ROWS": 16, "DEPTH": 256},
    )  # fmt: skip
