"""Cases of the state-graph likelihood that are compiled ahead of time: lengths for each block size, 1 and 4 ends."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from exlm_dist.kernels.dag import dag_log_likelihood


def _run(targets: int, states: int, ends: int) -> None:
    match = torch.empty(8, targets, states, device="meta", requires_grad=True)
    transitions = torch.empty(8, states, states, device="meta", requires_grad=True)
    sizes = torch.empty(8, dtype=torch.int64, device="meta")
    dag_log_likelihood(match, transitions, sizes, sizes, ends=ends, backend="triton").sum().backward()


CASES: dict[str, Callable[[], None]] = {
    f"N{targets} L{4 * targets} ends {ends}": functools.partial(_run, targets, 4 * targets, ends)
    for targets in (8, 21, 78, 400)
    for ends in (1, 4)
}
