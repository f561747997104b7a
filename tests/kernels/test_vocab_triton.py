"""The Triton form of the vocabulary match against its definition in fp64: interpreted at toy sizes, on a GPU at full
ones."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from cases import starts_of  # noqa: E402

import exlm_dist.kernels.vocab.triton as vocab_triton  # noqa: E402
from exlm_dist.kernels.vocab import (  # noqa: E402
    VocabShard,
    match_scores,
    naive,  # noqa: E402
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Case:
    """Sequences of `targets` with k states each; hidden [S, D], weight [V, D], bias [V], ids [N], and a gradient."""

    targets: list[int]
    k: int
    inputs: list[Tensor]
    ids: Tensor
    grad: Tensor

    @classmethod
    def make(
        cls,
        targets: list[int],
        k: int,
        width: int,
        vocabulary: int,
        *,
        seed: int = 0,
        scale: float = 1.0,
        padding: int = 3,
    ) -> Case:
        """Random; the first tokens repeat, and `padding` states and targets belong to no sequence."""
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(k * sum(targets) + padding, width, generator=generator) * scale
        weight = torch.randn(vocabulary, width, generator=generator) * width**-0.5
        ids = torch.randint(vocabulary, (sum(targets) + padding,), generator=generator)
        ids[: min(4, sum(targets))] = 3
        grad = torch.rand(len(targets), max(targets) + 1, k * max(targets) + 1, generator=generator)
        return cls(targets, k, [hidden, weight, torch.randn(vocabulary, generator=generator)], ids, grad)

    def evaluate(
        self, backend: str, dtype: torch.dtype, shard: VocabShard | None = None, words: slice = slice(None)
    ) -> list[Tensor]:
        """[match, gradients of hidden, weight, bias] of a backend, or of the definition: `naive`.

        The incoming gradient is NaN where match is -inf, for the kernels.
        """
        hidden, weight, bias = (tensor.to(DEVICE, dtype) for tensor in self.inputs)
        leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight[words].clone(), bias[words].clone())]
        states = starts_of([self.k * n for n in self.targets]).to(DEVICE)
        sizes = starts_of(self.targets).to(DEVICE), self.grad.shape[2], self.grad.shape[1]
        if backend == "naive":
            match = naive.match_scores(*leaves, self.ids.to(DEVICE), states, *sizes)
        else:
            match = match_scores(*leaves, self.ids.to(DEVICE), states, *sizes, shard=shard, backend=backend)
        rest = torch.nan if backend == "triton" else 0.0
        match.backward(self.grad.to(match).where(match.isfinite(), rest))
        return [match.detach(), *(leaf.grad for leaf in leaves)]


def agree(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    """Relative error of each output within `tolerance` of the definition on the same (rounded) inputs in fp64."""
    ours = case.evaluate("triton", dtype)
    case.inputs = [tensor.to(dtype).double() for tensor in case.inputs]
    exact = case.evaluate("naive", torch.float64)
    assert torch.equal(exact[0].isfinite(), ours[0].isfinite())
    own = exact[0].isfinite()
    torch.testing.assert_close(ours[0][own].double(), exact[0][own], rtol=3e-6, atol=3e-5)
    for got, want in zip(ours[1:], exact[1:]):
        assert (got.double() - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize(
    "targets, k, width, vocabulary", [([3, 1, 5], 4, 24, 77), ([1], 1, 16, 5), ([33, 2], 2, 64, 130)]
)
def test_agrees_with_the_definition(targets: list[int], k: int, width: int, vocabulary: int) -> None:
    agree(Case.make(targets, k, width, vocabulary), torch.float32, 2e-6)


def test_half_precision() -> None:
    agree(Case.make([3, 1, 5], 2, 64, 130, seed=1), torch.float16, 2e-3)


def test_large_logits() -> None:
    case = Case.make([3, 1, 5], 2, 32, 70, seed=2, scale=200.0)
    agree(case, torch.float32, 2e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float16, 2e-3)])
def test_blocks_of_rows_and_chunks_of_words(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    """Three blocks, the last of them short, and as many chunks; twice the same bits."""
    for name in ("WORDS_OF_FEW", "WORDS_OF_MANY"):
        monkeypatch.setattr(vocab_triton, name, 128)
    monkeypatch.setattr(vocab_triton, "LOGITS", 128 * 128)
    case = Case.make([40, 9, 33], 4, 24, 300, seed=8)
    tiles = vocab_triton.Tiles.of(case.inputs[0], case.inputs[1])
    assert (len(case.inputs[0]), tiles.block, tiles.chunk) == (331, 128, 128)
    first, again = case.evaluate("triton", dtype), case.evaluate("triton", dtype)
    assert all(torch.equal(one, other) for one, other in zip(first, again))
    agree(case, dtype, tolerance)


@pytest.mark.parametrize("total", [1, 66, 128, 5003, 5632, 5633, 25152, 50304, 43008, 43101])
@pytest.mark.parametrize("most", [128, 5632, 11264, 12390])
def test_parts_are_few_and_even(total: int, most: int) -> None:
    part = vocab_triton._part(total, most)
    count = vocab_triton.cdiv(total, part)
    assert part <= max(most, min(total, most)) and (part == total or part % 128 == 0)
    # Fewest of whole tiles, and no tile could be taken from all of them.
    assert count == 1 or (count - 1) * (most // 128 * 128) < total
    assert count == 1 or count * (part - 128) < total


def test_other_sequences_of_the_batch_and_their_order_change_nothing() -> None:
    case = Case.make([3, 7, 2], 2, 32, 70, seed=3, padding=0)
    whole = case.evaluate("triton", torch.float32)[0]
    order = [2, 0, 1]
    case.inputs[0] = torch.cat([case.inputs[0].split([2 * n for n in (3, 7, 2)])[b] for b in order])
    case.ids = torch.cat([case.ids.split([3, 7, 2])[b] for b in order])
    case.targets = [2, 3, 7]
    assert torch.equal(case.evaluate("triton", torch.float32)[0], whole[order])
    case.inputs[0], case.ids, case.targets, case.grad = case.inputs[0][:4], case.ids[:2], [2], case.grad[:1]
    assert torch.equal(case.evaluate("triton", torch.float32)[0], whole[order][:1])


@pytest.mark.parametrize("backend", ["triton", "triton in blocks", "torch"])
def test_shards_of_the_vocabulary_equal_the_whole(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Two ranks simulated one after the other: the first round only collects what each would send."""
    case = Case.make([3, 1, 5], 4, 24, 77, seed=4)
    if backend == "triton in blocks":
        backend, case = "triton", Case.make([13, 25, 1], 4, 24, 77, seed=4)
        monkeypatch.setattr(vocab_triton, "LOGITS", 128 * 77)
    dtype = torch.float32 if backend == "triton" else torch.float64
    whole = case.evaluate("naive", dtype)
    parts = [slice(0, 30), slice(30, 77)]
    sent: dict[str, list[Tensor]] = {"lse": [], "sum": []}

    def record(name: str):
        return lambda tensor: sent[name].append(tensor.clone()) or tensor.clone()

    for words in parts:
        case.evaluate(backend, dtype, VocabShard(words.start, record("lse"), record("sum")), words)
    # The second all-reduce sums local scores, which do not depend on the result of the first.
    shards = [
        VocabShard(words.start, lambda _: torch.stack(sent["lse"]).logsumexp(0), lambda _: sum(sent["sum"]).clone())
        for words in parts
    ]
    results = [case.evaluate(backend, dtype, shard, words) for shard, words in zip(shards, parts)]
    own = whole[0].isfinite()
    for match, *_ in results:
        assert torch.equal(match.isfinite(), own)
        torch.testing.assert_close(match[own], whole[0][own], rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(results[0][1] + results[1][1], whole[1], rtol=1e-5, atol=1e-5)
    for sharded in (2, 3):
        joined = torch.cat([result[sharded] for result in results])
        torch.testing.assert_close(joined, whole[sharded], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 2e-3), (torch.float32, 5e-6)])
def test_full_size(dtype: torch.dtype, tolerance: float) -> None:
    agree(Case.make([21, 78, 1, 2, 16, 60], 4, 768, 50304, seed=5), dtype, tolerance)
    agree(Case.make([21] * 64, 4, 768, 5003, seed=6), dtype, tolerance)


@pytest.mark.gpu
def test_full_size_in_blocks_of_rows() -> None:
    """More rows than a block: the sum over the blocks, and the products that start it afresh, repeat bitwise."""
    case = Case.make([21, 78] * 120, 4, 256, 5760, seed=9)
    first, again = case.evaluate("triton", torch.bfloat16), case.evaluate("triton", torch.bfloat16)
    assert all(torch.equal(one, other) for one, other in zip(first, again))
    agree(case, torch.bfloat16, 8e-3)


@pytest.mark.gpu
def test_repeats_bitwise_without_host_synchronisation() -> None:
    case = Case.make([21] * 64, 4, 256, 5003, seed=7)
    first = case.evaluate("triton", torch.bfloat16)
    again = case.evaluate("triton", torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    hidden, weight, bias = (tensor.to(DEVICE, torch.bfloat16).requires_grad_() for tensor in case.inputs)
    starts = [starts_of(lengths).to(DEVICE) for lengths in ([84] * 64, [21] * 64)]
    ids = case.ids.to(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        match_scores(hidden, weight, bias, ids, *starts, 84, 21, backend="triton").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
