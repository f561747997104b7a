"""Transition log-probabilities, forward and backward, and the obvious torch form that stores [B, L, L, H]."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from timing import Case
from torch import Tensor

from exlm_dist.kernels.transitions import JumpPrior, transition_log_probs

STATES_PER_TARGET = 4
WIDTH, FLOOR = 0.125, 12.0  # of the prior over groups


def cases(device: torch.device, toy: bool) -> Iterator[Case]:
    """S=128 and S=512 at k=4, heads of base, dense transitions: 64 sequences, and as many as in a step of `step.py`;
    the latter also with a prior over groups.
    """
    whole = ((2, 8),) if toy else ((512, 84), (128, 312))
    for count, states in whole if toy else ((64, 84), (64, 312), *whole):
        for prior in (False, True) if (count, states) in whole else (False,):
            yield _Batch(count, states, 2 if toy else 12, 16 if toy else 64, device, prior=prior).case()


class _Batch:
    """States of sequences of equal length, and the sides that work on them."""

    def __init__(self, count: int, states: int, heads: int, width: int, device: torch.device, *, prior: bool) -> None:
        torch.manual_seed(0)
        self.shape = (count, states, heads, width)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        rows = count * states
        self.inputs = [
            torch.randn(*size, device=device).to(dtype).requires_grad_()
            for size in ((rows, heads, width), (rows, heads, width), (rows, heads))
        ]
        self.starts = torch.arange(0, rows + 1, states, device=device)
        self.grad = torch.rand(count, states, states, device=device)
        self.forward = torch.ones(states, states, dtype=torch.bool, device=device).triu(1)
        self.rule = {"states_per_target": STATES_PER_TARGET, "prior": None}
        self.bias: Tensor | None = None
        if prior:
            self.rule["prior"] = JumpPrior("group", WIDTH, FLOOR)
            group = torch.arange(states, device=device) // STATES_PER_TARGET
            self.bias = -((group - group[:, None] - 1).abs() / WIDTH).clamp(max=FLOOR)[:, :, None]
        self.wanted: list[Tensor] | None = None

    def case(self) -> Case:
        """The comparison."""
        count, states, heads, width = self.shape
        sides = {"ours": lambda: self._whole(self._ours()), "torch": lambda: self._whole(self._torch())}
        sizes = f"B={count}, L={states}, H={heads}, P={width}{', prior over groups' if self.rule['prior'] else ''}"
        bound = 1e-2 if self.inputs[0].dtype == torch.bfloat16 else 1e-5
        return Case("transitions", sizes, "ours", sides, lambda name: self._error(sides[name]()), bound, 10, 50)

    def _whole(self, out: Tensor) -> list[Tensor]:
        return [out.detach(), *torch.autograd.grad(out, self.inputs, self.grad)]

    def _ours(self) -> Tensor:
        return transition_log_probs(*self.inputs, self.starts, self.shape[1], **self.rule)

    def _torch(self) -> Tensor:
        count, states, heads, width = self.shape
        query, key = (tensor.view(count, states, heads, width) for tensor in self.inputs[:2])
        scores = torch.einsum("bvhp,buhp->bvuh", query, key).float() * width**-0.5
        if self.bias is not None:
            scores = scores + self.bias
        heads_log = scores.masked_fill(~self.forward[:, :, None], -torch.inf).log_softmax(2)
        joint = heads_log + self.inputs[2].view(count, states, 1, heads).float().log_softmax(-1)
        # The last state has no successor: its row is NaN and is dropped with the transitions that are not allowed.
        return torch.where(self.forward, joint.masked_fill(~self.forward[:, :, None], 0).logsumexp(-1), 0.0)

    def _error(self, found: list[Tensor]) -> float:
        """Largest relative error (Frobenius) over log E of the allowed transitions and the gradients, against fp64."""
        if self.wanted is None:
            inputs = [tensor.detach().double().requires_grad_() for tensor in self.inputs]
            out = transition_log_probs(*inputs, self.starts, self.shape[1], **self.rule, backend="torch")
            grad = self.grad.double().where(self.forward, 0)
            self.wanted = [out.detach(), *torch.autograd.grad(out, inputs, grad)]
        allowed = self.forward.expand_as(found[0])
        pairs = [(found[0][allowed], self.wanted[0][allowed]), *zip(found[1:], self.wanted[1:])]
        return max(float((got.double() - want).norm() / want.norm()) for got, want in pairs)
