"""Transition log-probabilities on a GPU: tiles of the allowed triangle only, nothing of [L, L, H] stored.

Scores are in base 2. Forward: one kernel stores the lse of each (head, state), a second sums over the heads tile by
tile. Backward: with the responsibility w_h = p(head h | transition v -> u) in [0, 1] and G the gradient of log E, the
gradient of a score is w_h G - p_h sum_u(w_h G); no probability is divided by, so none can underflow into a wrong
gradient (README.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from exlm_dist.kernels.launch import cdiv, launch, next_power_of_2
from exlm_dist.kernels.transitions import torch as torch_form
from exlm_dist.kernels.transitions.prior import JumpPrior
from exlm_dist.kernels.transitions.triton.backward import key_gradient_kernel, query_gradient_kernel, row_sum_kernel
from exlm_dist.kernels.transitions.triton.forward import mixture_kernel, normaliser_kernel

LOG2E = math.log2(math.e)


def transition_log_probs(
    query: Tensor, key: Tensor, gate: Tensor, cu_states: Tensor, max_states: int, *,
    states_per_target: int, sparse: bool, prior: JumpPrior | None,
) -> Tensor:  # fmt: skip
    """Dense or sparse log E; see `exlm_dist.kernels.transitions`."""
    if query.dtype == torch.float64:
        return torch_form.transition_log_probs(
            query, key, gate, cu_states, max_states, states_per_target=states_per_target, sparse=sparse, prior=prior
        )
    return _Transitions.apply(query, key, gate, cu_states, max_states, _Rule(states_per_target, sparse, prior))


def uniform_log_probs(cu_states: Tensor, max_states: int) -> Tensor:
    """See `exlm_dist.kernels.transitions`: no parameters, once per batch, plain torch is enough."""
    return torch_form.uniform_log_probs(cu_states, max_states)


@dataclass(frozen=True)
class _Rule:
    """Which transitions are allowed, and the prior over them."""

    states_per_target: int
    sparse: bool
    prior: JumpPrior | None

    def constants(self) -> dict[str, Any]:
        """What is compiled in; without a prior nothing of it, and k only where it decides what is allowed."""
        return {
            "GROUP": self.states_per_target if self.sparse else 0,
            "PRIOR": "none" if self.prior is None else self.prior.kind,
            "STEP": 0 if self.prior is None else self.states_per_target,
        }

    def numbers(self, width: int) -> dict[str, float | None]:
        """Factor from q.k to scores in base 2; slope and least value of the prior, which is added to q.k."""
        numbers: dict[str, float | None] = {"scale": width**-0.5 * LOG2E, "slope": None, "lowest": None}
        if self.prior is not None:
            spread = 2 * self.prior.width**2 if self.prior.kind == "gaussian" else self.prior.width
            numbers |= {"slope": -(width**0.5) / spread, "lowest": -(width**0.5) * self.prior.floor}
        return numbers


class _Transitions(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, gate, cu_states, max_states, rule):
        query, key, gate = query.contiguous(), key.contiguous(), gate.contiguous()
        rows, heads, width = query.shape
        count = len(cu_states) - 1
        lse = torch.empty((heads, rows), dtype=torch.float32, device=gate.device)
        base = torch.empty_like(lse)
        out = torch.empty((count, max_states, max_states), dtype=torch.float32, device=gate.device)
        settings, align, warps = _settings(query, max_states, rule)
        packed = {
            "query": query, "key": key, "cu_states": cu_states, "base": base, "rows": rows, **rule.numbers(width),
        }  # fmt: skip
        grid = (cdiv(max_states, settings["ROWS"]), heads, count)
        states = {**packed, "gate": gate, "lse": lse}
        launch(normaliser_kernel, grid, states, {**settings, "HEADS": next_power_of_2(heads)}, warps=warps)
        grid = (cdiv(max_states, settings["COLUMNS"]), grid[0], count)
        mixed = {**packed, "out": out, "side": max_states // align}
        launch(mixture_kernel, grid, mixed, {**settings, "ALIGN": align}, warps=warps)
        ctx.save_for_backward(query, key, gate, cu_states, lse, base, out)
        ctx.settings = (max_states, rule)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, gate, cu_states, lse, base, out = ctx.saved_tensors
        max_states, rule = ctx.settings
        rows, heads, width = query.shape
        count = len(cu_states) - 1
        settings, align, warps = _settings(query, max_states, rule)
        constants = {**settings, "ALIGN": align}
        down, across = (cdiv(max_states, settings[side]) for side in ("ROWS", "COLUMNS"))
        tile_sums = torch.empty((across, heads, rows), dtype=torch.float32, device=query.device)
        row_sums = torch.empty_like(lse)
        grad_query, grad_key, grad_gate = (torch.empty_like(tensor) for tensor in (query, key, gate))
        arguments = {
            "query": query, "key": key, "cu_states": cu_states, "base": base, "out": out,
            "grad_out": grad_out.contiguous(), "side": max_states // align, "rows": rows, **rule.numbers(width),
        }  # fmt: skip
        # With eight warps ptxas spills a few bytes rather than use the registers it has, unless told how many.
        limit = 168 if warps == 8 else None
        totals = {**arguments, "tile_sums": tile_sums}
        registers = limit if rule.prior else None
        launch(row_sum_kernel, (across, down, count), totals, constants, warps=warps, registers=registers)
        arguments |= {"lse": lse, "row_sums": row_sums, "grad_query": grad_query, "root": width**-0.5}
        constants = {**constants, **_heads_per_program(settings, warps)}
        down, groups = cdiv(max_states, constants["ROWS"]), heads // constants["EACH"]
        gradient = {**arguments, "tile_sums": tile_sums}
        launch(query_gradient_kernel, (down, groups, count), gradient, constants, warps=warps, registers=limit)
        arguments |= {"gate": gate, "grad_key": grad_key, "grad_gate": grad_gate}
        constants = {**constants, "HEADS": next_power_of_2(heads)}
        launch(key_gradient_kernel, (across, groups + 1, count + 1), arguments, constants, warps=warps)
        return grad_query, grad_key, grad_gate, None, None, None


def _heads_per_program(settings: dict[str, Any], warps: int) -> dict[str, int]:
    """Heads per program of the gradients, and rows of its tiles: two heads use what is read of log E, where registers
    suffice, which they do not with 64 rows. Chosen by counts, not measured.
    """
    pairs = warps == 4 and settings["heads"] % 2 == 0
    return {"EACH": 2, "ROWS": 32} if pairs else {"EACH": 1, "ROWS": settings["ROWS"]}


def _settings(query: Tensor, max_states: int, rule: _Rule) -> tuple[dict[str, Any], int, int]:
    """Compile-time constants of the tiled kernels, how many words of a row of log E can be read at once, and warps. The
    tiles were the fastest measured of kernels that executed more (docs/lab-log.md); not measured since.
    """
    _, heads, width = query.shape
    precise = query.dtype == torch.float32
    block = max(16, next_power_of_2(width))
    if precise:
        rows = columns = 32 if block <= 32 else 16
    else:
        rows, columns = (32 if max_states <= 128 else 64), 32
    settings = {
        "heads": heads,
        "width": width,
        "BLOCK": block,
        "ROWS": rows,
        "COLUMNS": columns,
        "PRECISION": "ieee" if precise else "tf32",
        **rule.constants(),
    }
    return settings, math.gcd(max_states, 4), 8 if precise or block > 64 else 4
