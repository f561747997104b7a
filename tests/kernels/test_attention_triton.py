"""The Triton form of attention against its definition in fp64: interpreted at toy sizes, on a GPU at full ones."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from cases import starts_of  # noqa: E402

from exlm_dist.kernels.attention import (  # noqa: E402
    attention,
    attention_packed,
    naive,  # noqa: E402
    rotary_angles,
)
from exlm_dist.kernels.attention import triton as kernels  # noqa: E402
from exlm_dist.kernels.attention.schedule import UNLIMITED, Plan, Range, Tiles, plan  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies bf16 wrongly, so bf16 is for the GPU only.
BOUNDS = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SMALL = Tiles(16, 16, 1, 4)


class Problem:
    """Random q, k, v [T, H, P] as slices of one matrix, angles and a gradient; NaN in the rows of no sequence."""

    def __init__(
        self, lengths: list[int], *, width: int, heads: int = 1, dtype: torch.dtype = torch.float32, padding: int = 5
    ) -> None:
        generator = torch.Generator().manual_seed(sum(lengths) + width)
        tokens = sum(lengths) + padding
        position = torch.arange(tokens)
        self.qkv = torch.randn(tokens, heads, 3, width, generator=generator).to(DEVICE, dtype)
        self.grad = torch.randn(tokens, heads, width, generator=generator).to(DEVICE, dtype)
        self.angles = rotary_angles(position % 97, position % 5, width).to(DEVICE)
        self.lengths, self.cu_tokens = lengths, starts_of(lengths).to(DEVICE)
        for rows in (self.qkv, self.grad, self.angles):
            rows[sum(lengths) :] = float("nan")

    def run(self, **options) -> list[Tensor]:
        """[out, grad q, grad k, grad v] of the kernels, in fp64 without the padding rows, which are checked to be 0."""
        parts = [part.detach().requires_grad_() for part in self.qkv.unbind(2)]
        out = attention(*parts, self.angles, self.cu_tokens, max(self.lengths), backend="triton", **options)
        return self.results(out, parts)

    def defined(self, masks: list[Tensor] | None = None) -> list[Tensor]:
        """The same by the definition in fp64, with the given dropout masks."""
        parts = [part.double().detach().requires_grad_() for part in self.qkv.unbind(2)]
        return self.results(naive.attention(*parts, self.angles, self.cu_tokens, masks), parts)

    def results(self, out: Tensor, parts: list[Tensor]) -> list[Tensor]:
        total = sum(self.lengths)
        found = [out.detach(), *torch.autograd.grad(out, parts, self.grad.to(out.dtype))]
        assert all(bool((tensor[total:] == 0).all()) for tensor in found)
        return [tensor[:total].double() for tensor in found]

    def check(self) -> None:
        """Every output and gradient within the bound of its type of the definition in fp64."""
        for name, got, want in zip("oqkv", self.run(), self.defined()):
            error = float((got - want).norm() / want.norm().clamp(min=1e-30))
            # one key alone: the gradients of q and k are exactly 0, and rounding is all there is
            bound = BOUNDS[self.qkv.dtype]
            assert error < bound or float((got - want).abs().max()) < bound, (name, error)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh buffers hold NaN, so that a row which no program writes shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))


def use(monkeypatch: pytest.MonkeyPatch, chosen: Plan) -> None:
    """Replace the table of tile sizes."""
    monkeypatch.setattr(kernels, "plan", lambda *_: chosen)


@pytest.mark.parametrize("lengths", [[1], [2, 1, 17], [15, 16, 33]])
def test_agrees_with_the_definition(lengths: list[int]) -> None:
    Problem(lengths, width=32, heads=2).check()


@pytest.mark.parametrize("lengths", [[63, 64, 65], [130]])
def test_half_precision_around_a_tile_edge(lengths: list[int]) -> None:
    Problem(lengths, width=64, dtype=torch.float16).check()


@pytest.mark.parametrize("width", [96, 128])
def test_wide_heads_and_a_width_that_is_no_power_of_two(width: int) -> None:
    Problem([3, 20], width=width).check()


def test_every_kind_of_tile_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths on both sides of the edges between ranges; a forward program holds three tiles of queries."""
    last = Range(48, UNLIMITED, Tiles(32, 16, 1, 4), rotated=True)
    forward = [Range(0, 8, SMALL), Range(8, 48, Tiles(16, 16, 3, 4)), last]
    queries = [Range(0, 9, Tiles(32, 16, 1, 4)), Range(9, 48, SMALL), last]
    keys = [Range(0, 48, SMALL), Range(48, UNLIMITED, Tiles(16, 32, 1, 4))]
    use(monkeypatch, Plan(forward, queries, keys))
    Problem([8, 9, 48, 49], width=32, padding=40).check()


def test_one_packed_operand_gives_the_same_bits() -> None:
    case = Problem([9, 12], width=32, heads=2)
    joined = case.qkv.detach().requires_grad_()
    out = attention_packed(joined, case.angles, case.cu_tokens, 12, dropout=0.2, seed=3, backend="triton")
    (grad,) = torch.autograd.grad(out, joined, case.grad)
    assert bool((grad[21:] == 0).all())
    found = [out.detach(), *grad.unbind(2)]
    for got, want in zip(found, case.run(dropout=0.2, seed=3)):
        assert torch.equal(got[:21].double(), want)


@pytest.mark.parametrize("width, heads", [(32, 2), (96, 1)])
def test_the_bias_gets_the_sums_of_the_gradient(monkeypatch: pytest.MonkeyPatch, width: int, heads: int) -> None:
    """Tiles of several sizes in one batch, an empty sequence, NaN where there is none."""
    ranges = [Range(0, 20, SMALL), Range(20, UNLIMITED, Tiles(32, 16, 1, 4), rotated=True)]
    use(monkeypatch, Plan(ranges, ranges, [Range(0, 20, Tiles(16, 32, 1, 4)), Range(20, UNLIMITED, SMALL)]))
    case = Problem([1, 16, 0, 17, 33, 2, 40], width=width, heads=heads, padding=50)
    joined, bias = case.qkv.detach().requires_grad_(), torch.zeros(heads * 3 * width, device=DEVICE).requires_grad_()
    options = {"bias": bias, "dropout": 0.2, "seed": 3, "backend": "triton"}
    out = attention_packed(joined, case.angles, case.cu_tokens, 40, **options)
    case.grad[sum(case.lengths) :] = 0
    grad, grad_bias = torch.autograd.grad(out, (joined, bias), case.grad)
    wanted = grad.double().sum(0).flatten()
    assert float((grad_bias - wanted).norm() / wanted.norm()) < BOUNDS[torch.float32]


def test_sequences_without_tokens_and_a_batch_without_padding() -> None:
    Problem([0, 5, 0, 18, 0], width=32, padding=0).check()


def test_operands_that_are_no_slices_of_one_matrix() -> None:
    case = Problem([9, 12], width=32)
    q, k, v = case.qkv.unbind(2)
    args = case.angles, case.cu_tokens, 12
    plain = attention(q, k, v, *args, backend="triton")
    mixed = attention(q.contiguous(), k, v.transpose(1, 2).contiguous().transpose(1, 2), *args, backend="triton")
    assert torch.equal(plain, mixed)


def test_large_scores_neither_overflow_nor_lose_the_winner() -> None:
    case = Problem([21], width=32)
    case.qkv[:, :, :2] *= 40  # scores of some thousands: one key takes all, and the weights' gradients vanish
    found = case.run()
    assert all(bool(tensor.isfinite().all()) for tensor in found)
    torch.testing.assert_close(found[0], case.defined()[0], rtol=1e-4, atol=1e-4)


def test_permuting_sequences_permutes_the_result_bitwise() -> None:
    case = Problem([7, 20, 33], width=32, padding=0)
    pieces = [torch.arange(0, 7), torch.arange(7, 27), torch.arange(27, 60)]
    order = torch.cat([pieces[2], pieces[0], pieces[1]]).to(DEVICE)
    plain = case.run()
    case.qkv, case.grad, case.angles = case.qkv[order], case.grad[order], case.angles[order]
    case.lengths, case.cu_tokens = [33, 7, 20], starts_of([33, 7, 20]).to(DEVICE)
    for got, want in zip(case.run(), plain):
        assert torch.equal(got, want[order])


def later_sequences_do_not_matter(case: Problem, count: int) -> None:
    """The first `count` tokens give the same bits when the sequences after them are gone."""
    whole = case.run()
    kept = [length for b, length in enumerate(case.lengths) if sum(case.lengths[: b + 1]) <= count]
    case.lengths, case.cu_tokens = kept, starts_of(kept).to(DEVICE)
    for got, want in zip(case.run(), whole):
        assert torch.equal(got, want[:count])


def test_other_sequences_of_the_batch_never_change_a_sequence() -> None:
    later_sequences_do_not_matter(Problem([5, 18, 70], width=32), 23)


def test_the_ranges_of_every_table_cover_every_length() -> None:
    for capability in ((8, 0), (9, 0), (10, 0)):
        for width in (32, 64, 96, 128):
            for size, dropout in ((2, False), (2, True), (4, False)):
                found = plan(width, size, dropout, capability)
                for ranges in (found.forward, found.queries, found.keys):
                    assert [part.lower for part in ranges] == [0, *[part.upper for part in ranges[:-1]]]
                    assert ranges[-1].upper == UNLIMITED


def kept_weights(seed: int, sequence: int, head: int, count: int, dropout: float, site: int = 0) -> Tensor:
    """The kernels' dropout mask [count, count] of one sequence and head, written with int64 and masks."""

    def mixed(x: Tensor, twist: Tensor | int = 0) -> Tensor:
        x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
        return (x ^ (x >> 15) ^ twist) * 0x846CA68B & 0xFFFFFFFF

    def extended(key: Tensor, number: int) -> Tensor:
        word = mixed(key + number * 0x9E3779B9 & 0xFFFFFFFF)
        return word ^ (word >> 16)

    low = mixed(torch.tensor(seed & 0xFFFFFFFF))
    key = low ^ (low >> 16)
    for number in (seed >> 32 & 0xFFFFFFFF, site, sequence, head):
        key = extended(key, number)
    index = torch.arange(count)
    pair = index // 16 * 8 + index % 8
    word = mixed(key + (index[:, None] << 16) + pair & 0xFFFFFFFF, extended(key, 1))
    lanes = torch.where((index & 8) != 0, (word + (word << 16) & 0xFFFFFFFF), word) >> 16
    return lanes >= round(dropout * 2**16)


def masked_attention(case: Problem, dropout: float, seed: int, first_head: int = 0, site: int = 0) -> list[Tensor]:
    """Output and gradients by the definition in fp64 with the kernels' mask."""
    heads = range(first_head, first_head + case.qkv.shape[1])
    kept = (
        torch.stack([kept_weights(seed, sequence, head, length, dropout, site) for head in heads])
        for sequence, length in enumerate(case.lengths)
    )
    scale = 1 / (1 - round(dropout * 2**16) / 2**16)
    return case.defined([mask.to(DEVICE, torch.float64) * scale for mask in kept])


@pytest.mark.parametrize("width", [32, 96])
def test_keys_rotated_before_give_the_same_as_keys_rotated_where_read(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    case, results = Problem([7, 35], width=width, heads=2), []
    for rotated in (False, True):
        chosen = [Range(0, UNLIMITED, SMALL, rotated)]
        use(monkeypatch, Plan(chosen, chosen, [Range(0, UNLIMITED, SMALL)]))
        results.append(case.run(dropout=0.3, seed=4))
        case.check()
    assert all(torch.equal(ours, other) for ours, other in zip(*results))


@pytest.mark.parametrize("tiles", [(16, 16), (32, 16), (16, 32)])
def test_dropout_forward_and_backward_agree_and_tiles_do_not_matter(
    monkeypatch: pytest.MonkeyPatch, tiles: tuple[int, int]
) -> None:
    chosen = [Range(0, UNLIMITED, Tiles(*tiles, 1, 4))]
    use(monkeypatch, Plan(chosen, chosen, chosen))
    case, seed = Problem([7, 35], width=32, heads=2), (1 << 63) + 12345
    for got, want in zip(case.run(dropout=0.3, seed=seed), masked_attention(case, 0.3, seed)):
        assert float((got - want).norm() / want.norm()) < BOUNDS[torch.float32]


def test_heads_of_one_rank_have_the_masks_of_the_whole_layer() -> None:
    case = Problem([7, 19], width=32, heads=2)
    key = {"dropout": 0.3, "seed": torch.tensor([9], device=DEVICE), "site": 2}
    found = case.run(**key, first_head=5, all_heads=8)
    for got, want in zip(found, masked_attention(case, 0.3, 9, first_head=5, site=2)):
        assert float((got - want).norm() / want.norm()) < BOUNDS[torch.float32]


def test_dropout_masks_are_fair_and_keyed() -> None:
    count, dropout = 256, 0.1
    mask = kept_weights(7, 0, 0, count, dropout).double()
    spread = (dropout * (1 - dropout) / count) ** 0.5
    assert abs(float(mask.mean()) - (1 - dropout)) < 4 * spread / count**0.5
    for axis in (0, 1):
        assert float((mask.mean(axis) - (1 - dropout)).abs().max()) < 5 * spread
    keys = [(8, 0, 0), (7, 1, 0), (7, 0, 1), (7 + (1 << 40), 0, 0)]
    others = [kept_weights(*key, count, dropout) for key in keys]
    others += [kept_weights(7, 0, 0, count, dropout, site=1), mask.T]
    others += [mask.roll(lag, axis) for lag in (1, 2, 4, 8, 16) for axis in (0, 1)]
    for other in others:
        both = float(((1 - mask) * (1 - other.double())).mean())
        assert abs(both - dropout**2) < 5 * dropout / count


def test_the_seed_decides() -> None:
    case = Problem([12], width=32)
    seeds = (3, torch.tensor([3], device=DEVICE), 4)
    first, again, other = (case.run(dropout=0.5, seed=seed)[0] for seed in seeds)
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="expected an int or one int64"):
        case.run(dropout=0.5, seed=torch.tensor([3.0]))


def test_new_angles_in_the_same_tensor_are_noticed() -> None:
    case = Problem([6], width=32, padding=0)
    case.run()
    case.angles.mul_(0.5)
    case.check()


def test_what_the_kernels_do_not_take_is_refused() -> None:
    case = Problem([4], width=16)
    with pytest.raises(ValueError, match="head widths 32, 64, 96 and 128"):
        case.run()
    with pytest.raises(ValueError, match="float32, bfloat16 and float16"):
        Problem([4], width=32, dtype=torch.float64).run()


FULL = [1, 2, 63, 64, 65, 128, 129, 191, 192, 193, 746]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_full_sizes(width: int, dtype: torch.dtype) -> None:
    Problem(FULL, width=width, heads=3, dtype=dtype, padding=300).check()


@pytest.mark.gpu
def test_512_sequences() -> None:
    Problem([191 - b % 40 for b in range(512)], width=64, heads=12, dtype=torch.bfloat16, padding=77).check()


@pytest.mark.gpu
def test_other_sequences_of_a_full_batch_never_change_a_sequence() -> None:
    later_sequences_do_not_matter(Problem([60, 128, 191, 746], width=64, heads=2, dtype=torch.bfloat16), 60 + 128 + 191)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_full_size_dropout(width: int) -> None:
    case = Problem([65, 191, 300], width=width, heads=2, dtype=torch.bfloat16)
    for got, want in zip(case.run(dropout=0.1, seed=5), masked_attention(case, 0.1, 5)):
        assert float((got - want).norm() / want.norm()) < BOUNDS[torch.bfloat16]


@pytest.mark.gpu
def test_no_synchronisation_and_capture_into_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    case = Problem([191, 65], width=64, heads=2, dtype=torch.bfloat16, padding=16)
    want = case.run()
    parts = [part.detach().requires_grad_() for part in case.qkv.unbind(2)]

    def step() -> list[Tensor]:
        out = attention(*parts, case.angles, case.cu_tokens, 191, backend="triton")
        return [out.detach(), *torch.autograd.grad(out, parts, case.grad)]

    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(captured, want):
        assert torch.equal(got[:256].double(), expected)


@pytest.mark.gpu
def test_a_captured_graph_draws_from_the_seed_of_its_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    case = Problem([191, 65], width=64, heads=2, dtype=torch.bfloat16, padding=0)
    seed = torch.tensor([1], device=DEVICE)
    options = {"dropout": 0.1, "backend": "triton"}
    parts = case.qkv.unbind(2)
    wanted = [attention(*parts, case.angles, case.cu_tokens, 191, seed=number, **options) for number in (1, 2)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(*parts, case.angles, case.cu_tokens, 191, seed=seed, **options)
    for number, want in zip((1, 2), wanted):
        seed.fill_(number)
        graph.replay()
        assert torch.equal(out, want)
