"""Cases of the transitions that are compiled ahead of time: head widths, types, dense and sparse, priors."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from exlm_dist.kernels.transitions import JumpPrior, transition_log_probs

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _run(width: int, dtype: torch.dtype, kind: str, states: int = 312, heads: int = 12, prior: str = "") -> None:
    query, key = (torch.empty(2496, heads, width, dtype=dtype, device="meta", requires_grad=True) for _ in range(2))
    gate = torch.empty(2496, heads, dtype=dtype, device="meta", requires_grad=True)
    starts = torch.empty(9, dtype=torch.int64, device="meta")
    rule = {"states_per_target": 4, "kind": kind, "prior": JumpPrior(prior, 1.0, 8.0) if prior else None}
    out = transition_log_probs(query, key, gate, starts, states, **rule, backend="triton")
    out.sum().backward()


CASES: dict[str, Callable[[], None]] = {
    **{
        f"P{width} {name} {kind}": functools.partial(_run, width, dtype, kind)
        for name, dtype in TYPES.items()
        for width in (32, 64, 96, 128)
        for kind in ("dense", "sparse")
    },
    # Few states; rows of odd and twice odd length, which are read by words of 4 and 8 bytes; an odd number of heads.
    **{
        f"P64 bf16 dense {states} states, {heads} heads": functools.partial(
            _run, 64, torch.bfloat16, "dense", states, heads
        )
        for states, heads in ((84, 12), (311, 12), (310, 12), (312, 11), (83, 11))
    },
    **{
        f"P{width} {name} dense, group prior": functools.partial(_run, width, dtype, "dense", prior="group")
        for name, dtype in TYPES.items()
        for width in (32, 64, 96, 128)
    },
    **{
        f"P{width} {name}, {prior} prior": functools.partial(_run, width, TYPES[name], "dense", prior=prior)
        for width, name in ((64, "bf16"), (32, "fp32"))
        for prior in ("gaussian", "laplace")
    },
}
