"""State-graph likelihood on a GPU: two launches forward, one backward, no host synchronisation.

The recursions run in the probability domain (`recursion.py`). Posteriors of each target must sum to 1
(`gradient.py`): a sequence where they do not, or with a transition that underflows in fp32, is computed again in log
space by the program that noticed (`fallback.py`). The best path, needed for analysis only, is that of `torch.py`.
The kernels pass results on in one workspace, sequence by sequence: with few sequences the host is the limit, and every
tensor and every argument of a kernel costs it time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from exlm_dist.kernels.dag import torch as torch_form
from exlm_dist.kernels.dag.triton.fallback import check_kernel
from exlm_dist.kernels.dag.triton.gradient import gradient_kernel
from exlm_dist.kernels.dag.triton.recursion import TOTALS, scan_kernel
from exlm_dist.kernels.launch import capability, cdiv, launch, next_power_of_2

MATCH_ROWS = 8
GRADIENT_TILE = 64

_fallbacks: dict[tuple[torch.device, int], Tensor] = {}


def fallback_count(device: torch.device) -> Tensor:
    """How many sequences needed log space on `device` since the start, int64 []; stays on the device."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    counts = [counter.sum() for (where, _), counter in _fallbacks.items() if where == device]
    return torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.int64, device=device)


def _counter(device: torch.device, count: int) -> Tensor:
    """Counters of `count` sequences, int64 [count]: one each, so that no two programs write to the same address."""
    counter = _fallbacks.get((device, count))
    if counter is None:
        counter = _fallbacks[device, count] = torch.zeros(count, dtype=torch.int64, device=device)
    return counter


def dag_log_likelihood(
    match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, *, ends: int
) -> Tensor:
    """See `exlm_dist.kernels.dag.dag_log_likelihood`."""
    if match.dtype == torch.float64:
        return torch_form.dag_log_likelihood(match, transitions, num_targets, num_states, ends=ends)
    return _LogLikelihood.apply(match, transitions, num_targets, num_states, ends)


def dag_posteriors(
    match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, *, ends: int
) -> Tensor:
    """See `exlm_dist.kernels.dag.dag_posteriors`."""
    if match.dtype == torch.float64:
        return torch_form.dag_posteriors(match, transitions, num_targets, num_states, ends=ends)
    return _scan(match, transitions, num_targets, num_states, ends, Block.of(match.shape[2], match.device))[2]


def dag_best_path(
    match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, *, ends: int
) -> tuple[Tensor, Tensor]:
    """See `exlm_dist.kernels.dag.dag_best_path`."""
    return torch_form.dag_best_path(match, transitions, num_targets, num_states, ends=ends)


@dataclass(frozen=True)
class Block:
    """States in registers at a time, and the settings that go with them."""

    states: int
    part: int
    rows: int
    warps: int

    @classmethod
    def of(cls, states: int, device: torch.device) -> Block:
        """The fastest measured for sequences of up to `states` states (benchmarks/results); none spills registers."""
        if states <= 64 or capability(device) < (9, 0):
            return cls(64, 32, 32, 4)
        return cls(128, 16, 16, 8)


class _LogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(ctx, match, transitions, num_targets, num_states, ends):
        ctx.block = Block.of(match.shape[2], match.device)
        log_likelihood, work, gamma = _scan(match, transitions, num_targets, num_states, ends, ctx.block)
        ctx.save_for_backward(transitions, num_targets, num_states, work, gamma)
        return log_likelihood

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        saved = ctx.saved_tensors
        dtype, grads = saved[0].dtype, _gradients(*saved, grad_out.contiguous(), ctx.block)
        return *(grads if dtype == torch.float32 else (grad.to(dtype) for grad in grads)), None, None, None


def work_size(targets: int, states: int, block: Block) -> int:
    """fp32 elements of a sequence in the workspace: see `recursion.regions`."""
    return 2 * targets * states + 3 * targets * cdiv(states, block.states) + TOTALS.value


def _scan(
    match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, ends: int, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    """Likelihoods [B], workspace and posteriors [B, N, L]: both recursions, the check of the posteriors, and log space
    for the sequences that fail it.
    """
    match, transitions, device = match.float().contiguous(), transitions.float().contiguous(), match.device
    count, targets, states = match.shape
    size, blocks = work_size(targets, states, block), cdiv(states, block.states)
    assert max(size, states * states) < 2**31, "addresses within a sequence are 32 bits wide"
    work = torch.empty((count, size), dtype=torch.float32, device=device)
    gamma = torch.empty(match.shape, dtype=torch.float32, device=device)  # beta, until the check turns it into gamma
    log_likelihood = torch.empty(count, dtype=torch.float32, device=device)
    common = {
        "match": match, "transitions": transitions, "num_targets": num_targets, "num_states": num_states, "work": work,
        "targets": targets, "states": states, "blocks": blocks,
    }  # fmt: skip
    constants = {"BLOCK": block.states, "ENDS": ends}
    launch(
        scan_kernel,
        (2 * count,),
        {**common, "beta": gamma},
        {**constants, "PART": block.part, "ROWS": block.rows, "PRECISION": "tf32x3"},
        warps=block.warps,
        stages=1,
    )
    launch(
        check_kernel,
        (count,),
        {**common, "gamma": gamma, "log_likelihood": log_likelihood, "counter": _counter(device, count)},
        {**constants, "ROWS": 16, "COLUMNS": 128, "STATES": 32, "SPAN": max(32, next_power_of_2(ends))},
        warps=8,
        stages=1,
    )
    return log_likelihood, work, gamma


def _gradients(
    transitions: Tensor, num_targets: Tensor, num_states: Tensor, work: Tensor, gamma: Tensor, grad_out: Tensor,
    block: Block,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of match [B, N, L] and transitions [B, L, L], each sequence times its grad_out [B]."""
    count, targets, states = gamma.shape
    transitions = transitions.float().contiguous()
    grad_match, grad_transitions = torch.empty_like(gamma), torch.empty_like(transitions)
    tile = min(GRADIENT_TILE, block.states)
    launch(
        gradient_kernel,
        (cdiv(states, tile) ** 2 + cdiv(targets, MATCH_ROWS), count),
        {"transitions": transitions, "num_targets": num_targets, "num_states": num_states, "work": work, "gamma": gamma,
         "grad_out": grad_out, "grad_match": grad_match, "grad_transitions": grad_transitions, "targets": targets,
         "states": states, "blocks": cdiv(states, block.states)},
        {"BLOCK": block.states, "TILE": tile, "DEPTH": 16, "ROWS": MATCH_ROWS, "PRECISION": "tf32x3"},
        warps=8,
        stages=1,
        registers=128,
    )  # fmt: skip
    return grad_match, grad_transitions
