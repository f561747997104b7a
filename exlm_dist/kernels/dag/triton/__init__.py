"""Triton form of the state-graph likelihood: three launches forward, one backward, no host synchronisation.

The recursions run in the probability domain (`recursion.py`). Posteriors of each target must sum to 1
(`gradient.py`): a sequence where they do not, or with a move too faint for fp32, is done again in the log domain by
its own program (`fallback.py`), which leaves at once otherwise. The best path, needed for analysis only, is that of
the definition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from exlm_dist.kernels.dag import reference
from exlm_dist.kernels.dag.triton.fallback import fallback_kernel
from exlm_dist.kernels.dag.triton.gradient import gradient_kernel, posterior_kernel
from exlm_dist.kernels.dag.triton.recursion import scan_kernel
from exlm_dist.kernels.launch import capability, launch

POSTERIOR_ROWS = 8
GRADIENT_TILE = 64

_fallbacks: dict[torch.device, Tensor] = {}


def fallback_count(device: torch.device) -> Tensor:
    """How many sequences went to the log-domain form on `device` since the start, int64 [1]; stays on the device."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _fallbacks:
        _fallbacks[device] = torch.zeros(1, dtype=torch.int64, device=device)
    return _fallbacks[device]


def dag_log_likelihood(
    match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, *, ends: int
) -> Tensor:
    """See `exlm_dist.kernels.dag.dag_log_likelihood`."""
    if match.dtype == torch.float64:
        return reference.dag_log_likelihood(match, transitions, num_targets, num_states, ends=ends)
    return _LogLikelihood.apply(match, transitions, num_targets, num_states, ends)


def dag_posteriors(
    match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, *, ends: int
) -> Tensor:
    """See `exlm_dist.kernels.dag.dag_posteriors`."""
    if match.dtype == torch.float64:
        return reference.dag_posteriors(match, transitions, num_targets, num_states, ends=ends)
    return _scan(match, transitions, num_targets, num_states, ends).gamma


def dag_best_path(
    match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, *, ends: int
) -> tuple[Tensor, Tensor]:
    """See `exlm_dist.kernels.dag.dag_best_path`."""
    return reference.dag_best_path(match, transitions, num_targets, num_states, ends=ends)


@dataclass(frozen=True)
class Block:
    """States held in registers at a time, and the settings that go with them."""

    states: int
    part: int
    rows: int
    warps: int

    @classmethod
    def of(cls, states: int, device: torch.device) -> Block:
        """The measured best for sequences of up to `states` states (benchmarks/results); none spills registers."""
        if states <= 64 or capability(device) < (9, 0):
            return cls(64, 32, 32, 4)
        return cls(128, 16, 16, 8)


@dataclass(frozen=True)
class _Scan:
    """What the recursions leave: alpha, omega = beta times the match [B, N, L] with scales [B, N, blocks], and
    totals.
    """

    alpha: Tensor
    alpha_scale: Tensor
    omega: Tensor
    omega_scale: Tensor
    total: Tensor
    total_scale: Tensor
    in_logs: Tensor
    gamma: Tensor
    log_likelihood: Tensor
    block: Block


class _LogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(ctx, match, transitions, num_targets, num_states, ends):
        scan = _scan(match, transitions, num_targets, num_states, ends)
        ctx.scan = scan
        ctx.save_for_backward(transitions, num_targets, num_states)
        # A copy: what autograd ties to this context must not be held by it, or it all lives until the next collection.
        return scan.log_likelihood.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        transitions, num_targets, num_states = ctx.saved_tensors
        grads = _gradients(ctx.scan, transitions, num_targets, num_states, grad_out.float().contiguous())
        return *(grad.to(transitions.dtype) for grad in grads), None, None, None


def _scan(
    match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, ends: int, block: Block | None = None
) -> _Scan:
    """Both recursions, posteriors, their check, and the log-domain form of the sequences that fail it."""
    match, moves = match.float().contiguous(), transitions.float().contiguous()
    count, targets, states = match.shape
    assert targets * states < 2**31 and states * states < 2**31, "addresses within a sequence are 32 bits wide"
    block = block or Block.of(states, match.device)
    blocks = triton.cdiv(states, block.states)
    chunks = triton.cdiv(targets, POSTERIOR_ROWS)
    ends_block = max(32, triton.next_power_of_2(ends))

    def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((count, *shape), dtype=dtype, device=match.device)

    paths = {name: rows(targets, states) for name in ("alpha", "omega", "beta")}
    paths |= {f"{name}_scale": rows(targets, blocks) for name in ("alpha", "omega", "beta")}
    sums = {"log_likelihood": rows(), "total": rows(), "total_scale": rows()}
    lengths = {"num_targets": num_targets, "num_states": num_states}
    shape = {"targets": targets, "states": states, "blocks": blocks}
    inputs = {"match": match, "moves": moves}
    faint, bad, in_logs = rows(dtype=torch.int32), rows(chunks, dtype=torch.int32), rows(dtype=torch.int32)
    gamma = rows(targets, states)
    launch(
        scan_kernel,
        (2 * count,),
        {**inputs, **lengths, **paths, **sums, "faint": faint, **shape, "ends": ends, "first_weight": 1.0 / ends},
        {
            "BLOCK": block.states,
            "PART": block.part,
            "ROWS": block.rows,
            "ENDS": ends_block,
            "PRECISION": "tf32x3",
        },
        warps=block.warps,
        stages=1,
    )
    read = {name: paths[name] for name in ("alpha", "alpha_scale", "beta", "beta_scale")}
    launch(
        posterior_kernel,
        (chunks, count),
        {**lengths, **read, "total": sums["total"], "total_scale": sums["total_scale"], "gamma": gamma, "bad": bad,
         **shape, "chunks": chunks},
        {"BLOCK": block.states, "ROWS": POSTERIOR_ROWS, "COLUMNS": 128},
    )
    launch(
        fallback_kernel,
        (count + 1,),
        {**inputs, **lengths, **paths, **sums, "gamma": gamma, "bad": bad, "faint": faint, "in_logs": in_logs,
         "counter": fallback_count(match.device), "count": count, **shape, "chunks": chunks, "ends": ends,
         "first_weight": 1.0 / ends},
        {"SPAN": 32, "ENDS": ends_block, "SEQUENCES": 128},
        warps=8,
        stages=1,
    )
    return _Scan(
        *(paths[name] for name in ("alpha", "alpha_scale", "omega", "omega_scale")),
        sums["total"], sums["total_scale"], in_logs, gamma, sums["log_likelihood"], block,
    )


def _gradients(
    scan: _Scan, transitions: Tensor, num_targets: Tensor, num_states: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of match [B, N, L] and transitions [B, L, L], each sequence times its grad_out [B]."""
    count, targets, states = scan.alpha.shape
    moves = transitions.float().contiguous()
    grad_match, grad_moves = torch.empty_like(scan.gamma), torch.empty_like(moves)
    tile = min(GRADIENT_TILE, scan.block.states)
    tiles = triton.cdiv(states, tile)
    launch(
        gradient_kernel,
        (tiles * tiles + triton.cdiv(targets, POSTERIOR_ROWS), count),
        {
            "moves": moves, "num_targets": num_targets, "num_states": num_states,
            "alpha": scan.alpha, "alpha_scale": scan.alpha_scale, "omega": scan.omega, "omega_scale": scan.omega_scale,
            "gamma": scan.gamma, "total": scan.total, "total_scale": scan.total_scale, "in_logs": scan.in_logs,
            "grad_out": grad_out, "grad_match": grad_match, "grad_moves": grad_moves,
            "targets": targets, "states": states, "blocks": scan.alpha_scale.shape[2], "tiles": tiles,
        },
        {"BLOCK": scan.block.states, "TILE": tile, "DEPTH": 16, "ROWS": POSTERIOR_ROWS, "PRECISION": "tf32x3"},
        warps=8,
    )  # fmt: skip
    return grad_match, grad_moves
