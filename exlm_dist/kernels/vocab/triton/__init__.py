"""Triton form of the vocabulary match: the logits live in registers, or as gradients of one chunk of words at a time.

Forward: each (rows, tile of words) leaves its largest logit and sum of exponentials, added up in a fixed order by a
second kernel; the scores of a sequence's own targets are a small product. Backward: for a chunk of words the logits
are made again and turned into gradients -Gamma_u p before they leave the registers (Gamma_u: the incoming gradient
summed over the targets), and cuBLAS multiplies them with the weights and the states. At the targets themselves the
gradients are sums over one sequence (for the states) and over equal tokens, sorted (for the weights). No atomics, no
host synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from exlm_dist.kernels.launch import capability, cdiv, launch
from exlm_dist.kernels.vocab import reference
from exlm_dist.kernels.vocab.shard import VocabShard
from exlm_dist.kernels.vocab.triton.backward import (
    logit_gradient_kernel,
    scatter_kernel,
    state_gradient_kernel,
    target_gradient_kernel,
)
from exlm_dist.kernels.vocab.triton.forward import LN2, log_sum_kernel, match_kernel, partial_sum_kernel


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
        return reference.match_scores(hidden, weight, bias, target_ids, cu_states, cu_targets, *sizes, shard=shard)
    return _MatchScores.apply(hidden, weight, bias, target_ids, cu_states, cu_targets, *sizes, shard)


@dataclass(frozen=True)
class Tiles:
    """Sizes of the product states x words, and the words whose gradients are held at a time."""

    rows: int
    words: int
    depth: int
    group: int
    warps: int
    stages: int
    chunk: int
    precision: str
    descriptors: bool = False

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor) -> Tiles:
        """The measured best for the type and the GPU (benchmarks/results)."""
        # Few rows: fewer chunks, or launching them takes longer than they do.
        chunk = 4096 if len(hidden) > 1 << 13 else 6400
        if hidden.dtype == torch.float32:
            return cls(64, 64, 32, 8, 4, 2, chunk, _precision(hidden))
        if capability(hidden.device) >= (9, 0):
            # A descriptor asks for 16-byte rows and starts; parameters that are slices of one flat buffer may lack
            # the latter.
            aligned = hidden.shape[1] * hidden.element_size() % 16 == 0
            aligned = aligned and (hidden.data_ptr() | weight.data_ptr()) % 16 == 0
            return cls(128, 128, 64, 8, 4, 3, chunk, _precision(hidden), descriptors=aligned)
        return cls(128, 128, 32, 8, 8, 3, chunk, _precision(hidden))

    def constants(self, width: int) -> dict[str, Any]:
        """Compile-time constants of the kernels that make logits."""
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
        log_sum = _log_sum(hidden, matrix, bias)
        match = torch.empty((len(cu_states) - 1, max_targets, max_states), dtype=torch.float32, device=hidden.device)
        if shard:
            log_sum = shard.log_sum(log_sum.mul_(LN2.value)).div_(LN2.value)
        depth = 32 if hidden.dtype == torch.float32 else 64
        launch(
            match_kernel,
            (cdiv(max_states, depth), cdiv(max_targets, 32), len(cu_states) - 1),
            {"hidden": hidden, "weight": matrix, "bias": bias, **sequences, "log_sum": log_sum, "match": match,
             "vocab": len(matrix), "width": hidden.shape[1], "first_token": first_token,
             "max_states": max_states, "max_targets": max_targets, "rest": 0.0 if shard else float("-inf")},
            {"TARGETS": 32, "STATES": depth, "DEPTH": depth, "EVEN": hidden.shape[1] % depth == 0,
             "WHOLE": shard is None, "PRECISION": _precision(hidden)},
        )  # fmt: skip
        if shard:
            match = _less_log_sum(shard.total(match), log_sum, cu_states, cu_targets)
        ctx.save_for_backward(hidden, matrix, bias, target_ids, cu_states, cu_targets, log_sum)
        ctx.settings = (first_token, weight.dtype)
        return match

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_match):
        hidden, matrix, bias, target_ids, cu_states, cu_targets, log_sum = ctx.saved_tensors
        first_token, weight_type = ctx.settings
        grad_match = grad_match.float().contiguous()
        sequences = {"cu_states": cu_states, "cu_targets": cu_targets}
        sizes = {"max_states": grad_match.shape[2], "max_targets": grad_match.shape[1], "count": len(cu_states) - 1}
        grad_hidden, mass = _at_states(hidden, matrix, target_ids, sequences, grad_match, first_token, sizes)
        grad_weight = torch.empty_like(matrix)
        grad_bias = torch.empty(len(matrix), dtype=torch.float32, device=bias.device)
        _through_softmax(hidden, matrix, bias, log_sum, mass, grad_hidden, grad_weight, grad_bias)
        _at_words(hidden, target_ids, sequences, grad_match, first_token, sizes, grad_weight, grad_bias)
        return (
            grad_hidden.to(hidden.dtype), grad_weight.to(weight_type), grad_bias.to(bias.dtype),
            None, None, None, None, None, None,
        )  # fmt: skip


def _precision(hidden: Tensor) -> str:
    """How fp32 operands are multiplied: exactly if the input is fp32, else gradients of match need no more than
    tf32.
    """
    return "ieee" if hidden.dtype == torch.float32 else "tf32"


def _tile(hidden: Tensor) -> tuple[int, int]:
    """States and columns of the width that a program of the gradients at the targets holds."""
    if hidden.dtype == torch.float32:
        return 32, 32
    return 64, 64 if hidden.shape[1] % 64 == 0 else 32


def _log_sum(hidden: Tensor, weight: Tensor, bias: Tensor, tiles: Tiles | None = None) -> Tensor:
    """log2 of the sum over the words of e^logit, fp32 [S]."""
    tiles = tiles or Tiles.of(hidden, weight)
    rows, width = hidden.shape
    across = cdiv(len(weight), tiles.words)
    top = torch.empty((across, rows), dtype=torch.float32, device=hidden.device)
    total = torch.empty_like(top)
    log_sum = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    parts = {"top": top, "total": total, "rows": rows, "tiles": across}
    launch(
        partial_sum_kernel,
        (cdiv(rows, tiles.rows) * across,),
        {**tiles.operands(hidden, weight), "bias": bias, **parts, "vocab": len(weight), "width": width},
        tiles.constants(width),
        warps=tiles.warps,
        stages=tiles.stages,
    )
    launch(log_sum_kernel, (cdiv(rows, 64),), {**parts, "log_sum": log_sum}, {"ROWS": 64, "TILES": 32})
    return log_sum


def _less_log_sum(scores: Tensor, log_sum: Tensor, cu_states: Tensor, cu_targets: Tensor) -> Tensor:
    """scores [B, N, L] summed over the shards, less the log-sum of their states; -inf outside own targets and
    states.
    """
    targets = torch.arange(scores.shape[1], device=scores.device) < cu_targets.diff()[:, None]
    states = torch.arange(scores.shape[2], device=scores.device) < cu_states.diff()[:, None]
    rows = (cu_states[:-1, None] + torch.arange(scores.shape[2], device=scores.device)).clamp(max=len(log_sum) - 1)
    inside = targets[:, :, None] & states[:, None, :]
    return torch.where(inside, scores - (log_sum * LN2.value)[rows][:, None], float("-inf"))


def _at_states(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    sequences: dict[str, Tensor],
    grad_match: Tensor,
    first_token: int,
    sizes: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """What the targets' own scores give to the states, fp32 [S, D], and the sum of grad_match over the targets, [S]."""
    rows, width = hidden.shape
    tile, depth = _tile(hidden)
    grad_hidden = torch.empty((rows, width), dtype=torch.float32, device=hidden.device)
    mass = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    launch(
        state_gradient_kernel,
        (cdiv(sizes["max_states"], tile), cdiv(width, depth), sizes["count"] + 1),
        {"weight": weight, "target_ids": target_ids, **sequences, "grad_match": grad_match, "mass": mass,
         "grad_hidden": grad_hidden, "rows": rows, "vocab": len(weight), "width": width, "first_token": first_token,
         **sizes},
        {"TARGETS": 32, "STATES": tile, "DEPTH": depth, "PRECISION": _precision(hidden)},
    )  # fmt: skip
    return grad_hidden, mass


def _through_softmax(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    log_sum: Tensor,
    mass: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    tiles: Tiles | None = None,
) -> None:
    """Add what the log-sum gives to grad_hidden (fp32), and write grad_weight and grad_bias, a chunk of words at a
    time.
    """
    tiles = tiles or Tiles.of(hidden, weight)
    rows, width = hidden.shape
    down = cdiv(rows, tiles.rows)
    buffer = torch.empty(rows * min(tiles.chunk, len(weight)), dtype=hidden.dtype, device=hidden.device)
    sums = torch.empty((down, len(weight)), dtype=torch.float32, device=hidden.device)
    shared = {
        **tiles.operands(hidden, weight), "bias": bias, "log_sum": log_sum, "mass": mass, "grad_bias": sums,
        "rows": rows, "vocab": len(weight), "width": width,
    }  # fmt: skip
    constants, start, grad = tiles.constants(width), 0, buffer[:0].view(0, 0)
    for words, grad_words in zip(weight.split(tiles.chunk), grad_weight.split(tiles.chunk)):
        chunk = len(words)
        if grad.shape[1] != chunk:  # all chunks but the last are of one size
            grad = buffer[: rows * chunk].view(rows, chunk)
            turned = grad.t()
        launch(
            logit_gradient_kernel,
            (down * cdiv(chunk, tiles.words),),
            {**shared, "grad": grad, "chunk": chunk, "start": start},
            constants,
            warps=tiles.warps,
            stages=tiles.stages,
        )
        torch.mm(turned, hidden, out=grad_words)
        _add_product(grad_hidden, grad, words)
        start += chunk
    torch.sum(sums, 0, out=grad_bias)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (fp32) += left @ right, the sum kept in fp32 throughout."""
    if total.device.type == "cuda" and left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


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
    """Add what the targets' own scores give to the rows of their tokens; each row has one owner, its sum a fixed
    order.
    """
    width = hidden.shape[1]
    tile, depth = _tile(hidden)
    pulled = torch.empty((len(target_ids), width), dtype=torch.float32, device=hidden.device)
    pulled_bias = torch.empty(len(target_ids), dtype=torch.float32, device=hidden.device)
    launch(
        target_gradient_kernel,
        (cdiv(width, depth), cdiv(sizes["max_targets"], 32), sizes["count"]),
        {"hidden": hidden, **sequences, "grad_match": grad_match, "pulled": pulled, "pulled_bias": pulled_bias,
         "width": width, **sizes},
        {"TARGETS": 32, "STATES": tile, "DEPTH": depth, "PRECISION": _precision(hidden)},
    )  # fmt: skip
    ids, order = torch.sort(target_ids, stable=True)
    launch(
        scatter_kernel,
        (cdiv(width, 256), len(ids)),
        {"ids": ids, "order": order, "cu_targets": sequences["cu_targets"], "pulled": pulled,
         "pulled_bias": pulled_bias, "grad_weight": grad_weight, "grad_bias": grad_bias, "targets": len(ids),
         "vocab": len(grad_weight), "width": width, "first_token": first_token, "count": sizes["count"]},
        {"ROWS": 16, "DEPTH": 256},
    )  # fmt: skip
