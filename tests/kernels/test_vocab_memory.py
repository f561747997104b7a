"""Peak memory of the backward pass of the vocabulary match, at the sizes of training, on the meta device.

Checked against a count tensor by tensor, fractions of the logits in bf16, and the planner's own count of the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from allocations import Allocations  # noqa: E402

from exlm_dist.config.schema import RunConfig  # noqa: E402
from exlm_dist.kernels.launch import record_launches  # noqa: E402
from exlm_dist.kernels.vocab import match_scores  # noqa: E402
from exlm_dist.planning import activations  # noqa: E402
from exlm_dist.planning.job import Job  # noqa: E402

WORDS, WIDTH, STATES = 50304, 768, 4
FP32, BF16 = 4, 2


@dataclass(frozen=True)
class Size:
    """Equal sequences; the block of rows and chunk of words worked on; bounds with and without results, as fractions of
    the bytes of bf16 logits."""

    sequences: int
    targets: int
    block: int
    chunk: int
    most: float
    beside: float

    @property
    def rows(self) -> int:
        """States of the batch."""
        return STATES * self.targets * self.sequences

    @property
    def logits(self) -> int:
        """Bytes of all logits in bf16."""
        return BF16 * self.rows * WORDS

    def match(self) -> int:
        """Bytes of the scores, the result of the forward pass."""
        return FP32 * self.sequences * STATES * self.targets**2

    def results(self) -> int:
        """Scores and gradients, which every implementation returns."""
        return self.match() + BF16 * (self.rows * WIDTH + WORDS * WIDTH + WORDS)

    def counted(self) -> int:
        """Bytes alive while the last block of a chunk is multiplied."""
        several = self.block < self.rows
        return (
            self.match()
            + FP32 * 2 * self.rows  # log-sums, kept, and sums of the incoming gradient
            + BF16 * WORDS * WIDTH  # gradient of the weights
            + FP32 * WORDS  # of the biases
            + FP32 * self.rows * WIDTH  # of the states, added to by every chunk
            + BF16 * self.block * self.chunk  # of the logits
            + FP32 * -(-self.block // 128) * WORDS  # sums for the biases, for each tile of rows
            + (FP32 * self.chunk * WIDTH if several else 0)  # gradient of a chunk of weights, added to by every block
        )


SIZES = [
    Size(64, 21, 5376, 6400, 0.32, 0.16),
    Size(64, 78, 9984, 5632, 0.145, 0.09),
    Size(512, 21, 10752, 5632, 0.09, 0.055),
    Size(128, 78, 9984, 5632, 0.09, 0.055),
    Size(1024, 21, 10752, 5632, 0.07, 0.045),
]


def measure(size: Size, words: int = WORDS) -> tuple[int, int, list[str]]:
    """(bytes at the peak of the backward pass, bytes left with the results, kernels launched)."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    leaves = [tensor.requires_grad_() for tensor in (empty(size.rows, WIDTH), empty(words, WIDTH), empty(words))]
    ids, starts = (empty(n, dtype=torch.int64) for n in (size.sequences * size.targets, size.sequences + 1))
    longest = STATES * size.targets
    grad = empty(size.sequences, size.targets, longest, dtype=torch.float32)
    with record_launches((9, 0), lambda item: item.kernel.__name__) as launched, Allocations() as allocations:
        match = match_scores(*leaves, ids, starts, starts, longest, size.targets, backend="triton")
        allocations.peak = allocations.live
        results = match, torch.autograd.grad(match, leaves, grad)
    left = allocations.live
    del results
    return allocations.peak, left, launched


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size.rows} rows")
def test_peak_of_the_backward_pass(size: Size) -> None:
    peak, left, _ = measure(size)
    assert (peak, left) == (size.counted(), size.results())
    assert peak <= size.most * size.logits
    assert peak - left <= size.beside * size.logits


def test_few_rows_take_few_launches() -> None:
    """Where launches set the pace: eight chunks of the vocabulary, and one of a small one for however many rows."""
    assert measure(Size(30, 21, 2520, 6400, 1, 1))[2].count("logit_gradient_kernel") == 8
    assert measure(Size(1000, 21, 84000, 128, 1, 1), words=128)[2].count("logit_gradient_kernel") == 1


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size.rows} rows")
def test_the_planner_counts_the_same(size: Size) -> None:
    config = RunConfig(
        name="memory",
        data={"path": "none"},
        model={"layers": 12, "width": WIDTH, "heads": 12, "ffn": 4 * WIDTH, "states": STATES},
        schedule={"steps": 10},
        batch={"sequences": size.sequences, "micro": size.sequences},
        precision={"dtype": "bf16"},
    )
    length = {21: 128, 78: 512}[size.targets]
    job = Job(config, WORDS, length, 1, gpu=True)
    assert job.states == pytest.approx(size.rows, rel=0.02)
    peak, _, _ = measure(size)
    assert activations._logits_work(job) == pytest.approx(peak - size.match(), rel=0.02)
