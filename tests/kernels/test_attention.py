"""Packed attention, in plain torch, against its definition (`naive.py`)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import starts_of
from golden import Golden, golden_cases

from exlm_dist.kernels import attention, rotary_angles
from exlm_dist.kernels.attention import attention_packed, naive
from exlm_dist.kernels.attention import torch as torch_form

BATCHES = [[5], [1], [4, 4, 4], [3, 7, 1, 7, 7, 2], [2, 0, 3]]


def example(lengths, heads=2, width=8, extra=3, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    total = sum(lengths) + extra
    q, k, v = (torch.randn(total, heads, width, dtype=dtype, requires_grad=True) for _ in range(3))
    angles = rotary_angles(torch.randint(0, 50, (total,)), torch.randint(0, 5, (total,)), width)
    return (q, k, v), angles, starts_of(lengths), max(lengths)


@pytest.fixture(params=["one by one", "padded"])
def form(request, monkeypatch):
    """Both ways of going through the batch: sequence by sequence (CPU), and padded (as on CUDA)."""
    if request.param == "padded":
        monkeypatch.setattr(
            torch_form, "_blocks", lambda starts, longest, heads: [torch_form._padded_block(starts, longest)]
        )


@pytest.mark.parametrize("lengths", BATCHES)
def test_equals_the_definition(form, lengths):
    qkv, angles, starts, longest = example(lengths)
    same_values_and_gradients(attention(*qkv, angles, starts, longest), naive.attention(*qkv, angles, starts), qkv)


@pytest.mark.parametrize("lengths", BATCHES)
def test_equals_the_definition_with_the_same_mask(form, lengths):
    qkv, angles, starts, longest = example(lengths)
    key = {"dropout": 0.3, "seed": 3}
    # Equal scores for all keys, and as values the unit vectors: the output is the mask over the number of keys.
    size = 2 * longest
    local = torch.cat([torch.arange(length) for length in lengths] + [torch.zeros(3, dtype=torch.int64)])
    flat = torch.zeros(len(local), 2, size, dtype=torch.float64)
    units = torch.eye(size, dtype=torch.float64)[local][:, None].expand_as(flat)
    rows = attention(flat, flat, units, torch.zeros(len(local), longest), starts, longest, **key)
    masks = [
        rows[start : start + length, :, :length].transpose(0, 1) * length for start, length in zip(starts, lengths)
    ]
    expected = naive.attention(*qkv, angles, starts, masks)
    same_values_and_gradients(attention(*qkv, angles, starts, longest, **key), expected, qkv)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("lengths", [[1], [6, 1, 9, 9, 2]])
def test_packed_by_row_and_by_column_with_a_bias(form, lengths, dropout):
    """`attention_packed` gives what `attention` does, and the bias the sum of the gradient; all lies by column."""
    (q, k, v), angles, starts, longest = example(lengths)
    key = {"dropout": dropout, "seed": 3}
    expected = attention(q, k, v, angles, starts, longest, **key)
    cotangent = torch.randn_like(expected)
    grads = torch.stack(torch.autograd.grad(expected, (q, k, v), cotangent), 2)
    packed = torch.stack([q, k, v], 2).detach()
    bias = torch.zeros(packed[0].numel(), dtype=packed.dtype, requires_grad=True)
    for qkv in (packed, packed.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)):
        qkv.requires_grad_()
        out = attention_packed(qkv, angles, starts, longest, bias=bias, **key)
        found, of_bias = torch.autograd.grad(out, (qkv, bias), cotangent)
        torch.testing.assert_close((out, found), (expected, grads), rtol=0, atol=1e-14)
        torch.testing.assert_close(of_bias, grads.sum(0).flatten(), rtol=0, atol=1e-13)
        assert out.permute(1, 2, 0).is_contiguous() and found.permute(1, 2, 3, 0).is_contiguous()


def same_values_and_gradients(out, expected, leaves):
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    cotangent = torch.randn_like(out)
    ours = torch.autograd.grad((out * cotangent).sum(), leaves)
    theirs = torch.autograd.grad((expected * cotangent).sum(), leaves)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(form, dropout):
    qkv, angles, starts, longest = example([3, 5], width=4, extra=1)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, angles, starts, longest, dropout=dropout, seed=3), qkv)


def test_padding_tokens_give_zero_and_no_gradient(form):
    qkv, angles, starts, longest = example([3, 4], extra=5)
    with torch.no_grad():
        for tensor in qkv:
            tensor[7:] = math.nan
    out = attention(*qkv, angles, starts, longest, dropout=0.2, seed=1)
    assert (out[7:] == 0).all() and out[:7].isfinite().all()
    for grad in torch.autograd.grad(out.sum(), qkv):
        assert (grad[7:] == 0).all() and grad.isfinite().all()


def test_other_sequences_of_the_batch_and_their_order_do_not_matter():
    lengths = [4, 6, 6, 3]
    (q, k, v), angles, starts, longest = example(lengths, extra=0, dtype=torch.float32)
    out = attention(q, k, v, angles, starts, longest)
    order = [2, 0, 3, 1]
    rows = torch.cat([torch.arange(starts[b], starts[b + 1]) for b in order])
    moved = attention(q[rows], k[rows], v[rows], angles[rows], starts_of([lengths[b] for b in order]), longest)
    torch.testing.assert_close(moved, out[rows], rtol=0, atol=1e-6)
    alone = attention(q[4:10], k[4:10], v[4:10], angles[4:10], starts_of([6]), 6)
    torch.testing.assert_close(alone, out[4:10], rtol=0, atol=1e-6)


def test_dropout_is_a_function_of_the_seed():
    (q, k, v), angles, starts, longest = example([40], heads=8, width=4, extra=0)
    run = lambda seed: attention(q, k, v, angles, starts, longest, dropout=0.1, seed=seed)  # noqa: E731
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    # With v = 1 an output is the sum of the kept weights over the probability of keeping one: 1 on average.
    ones = torch.ones_like(v)
    sums = torch.stack([attention(q * 0, k, ones, angles, starts, longest, dropout=0.25, seed=s) for s in range(20)])
    assert abs(float(sums.detach().mean()) - 1) < 0.01
    counts = (sums.detach()[..., 0] * 40 * 0.75).round()
    np.testing.assert_allclose((sums.detach()[..., 0] * 40 * 0.75).numpy(), counts.numpy(), atol=1e-9)


def test_heads_of_one_rank_have_the_masks_of_the_whole_layer(form, monkeypatch):
    monkeypatch.setattr(torch_form, "BLOCK_ELEMENTS", 300)  # so that the heads decide how many sequences are one block
    qkv, angles, starts, longest = example([5, 5, 5, 3, 5], heads=6)
    whole = attention(*qkv, angles, starts, longest, dropout=0.3, seed=3)
    grads = torch.autograd.grad(whole.square().sum(), qkv)
    for heads in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = [tensor[:, heads].detach().requires_grad_() for tensor in qkv]
        local = {"first_head": heads.start, "all_heads": 6}
        out = attention(*part, angles, starts, longest, dropout=0.3, seed=3, **local)
        torch.testing.assert_close(out, whole[:, heads], rtol=0, atol=1e-14)
        for ours, all_heads in zip(torch.autograd.grad(out.square().sum(), part), grads):
            torch.testing.assert_close(ours, all_heads[:, heads], rtol=0, atol=1e-13)


def test_large_scores_stay_finite():
    qkv, angles, starts, longest = example([6, 9], dtype=torch.float32)
    out = attention(qkv[0] * 200, qkv[1] * 200, qkv[2], angles, starts, longest)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), qkv))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype):
    qkv, angles, starts, longest = example([6, 9], dtype=dtype)
    out = attention(*qkv, angles, starts, longest)
    exact = attention(*(tensor.double() for tensor in qkv), angles, starts, longest)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_angles_1d_count_from_each_sequence_start():
    position = torch.tensor([0, 0, 1, 2, 2, 0, 0, 1, 0, 0])
    clone = torch.tensor([1, 2, 0, 1, 2, 1, 2, 0, 0, 0])
    angles = rotary_angles(position, clone, 8, "1d")
    assert angles[:, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 0]
    expected = torch.tensor([10000.0 ** (-2 * j / 8) for j in range(4)])
    torch.testing.assert_close(angles[1], expected)


@pytest.mark.parametrize("case", golden_cases("rope2d.npz"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_rotation(case, dtype):
    """Rotation and rotation back (the gradient), as `attention` does both; angles are fp32 in either type."""
    case = Golden("rope2d.npz").case(case)
    angles, order = golden_angles(case)
    rows = torch.stack([pack(case, f"in/{name}", dtype, order) for name in ("q", "k")])  # [2, T, H, D]
    columns = rows.permute(2, 0, 3, 1)
    rotation = torch_form._Rotation(angles, columns)
    scaled = torch.tensor([rows.shape[-1] ** -0.5, 1.0], dtype=torch.float64)[:, None, None, None]
    expected = torch.stack([pack(case, f"out/{name}_rot", torch.float64, order) for name in ("q", "k")])
    rotated = rotation.rotated(columns).permute(1, 3, 0, 2)
    torch.testing.assert_close(rotated.double(), scaled * expected, rtol=0, atol=5e-6)
    grads = torch.stack([pack(case, f"in/cot_{name}", dtype, order) for name in ("q", "k")]).permute(2, 0, 3, 1)
    back = torch.empty_like(grads)
    rotation.rotate_back(grads, back)
    expected = torch.stack([pack(case, f"grad/{name}", torch.float64, order) for name in ("q", "k")])
    torch.testing.assert_close(back.permute(1, 3, 0, 2).double(), scaled * expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("case", golden_cases("rope2d.npz"))
def test_golden_attention(case):
    """Through the public function: the weights are those of the authors' rotated queries and keys."""
    case = Golden("rope2d.npz").case(case)
    angles, order = golden_angles(case)
    q, k = (pack(case, f"in/{name}", torch.float64, order) for name in ("q", "k"))
    v = torch.randn_like(q)
    batch, length, width = case.settings["B"], case.settings["T"], case.settings["D"]
    out = attention(q * math.sqrt(width), k, v, angles, starts_of([length] * batch), length)
    rotated = [case.tensor(f"out/{name}_rot", torch.float64) for name in ("q", "k")]
    weights = (rotated[0] @ rotated[1].mT).softmax(-1)
    expected = weights @ v.unflatten(0, (batch, length)).transpose(1, 2)
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(0, 1), rtol=0, atol=2e-5)


def golden_angles(case):
    """Angles of all tokens, and our order of the head components: theirs is [pos_lo pos_hi clone_lo clone_hi]."""
    width = case.settings["D"]
    order = torch.arange(width).view(4, width // 4)[[0, 2, 1, 3]].flatten()
    position, clone = (case.tensor(f"in/pos_dim{axis}").flatten() for axis in (1, 2))
    return rotary_angles(position, clone, width), order


def pack(case, name, dtype, order):
    """[B, H, T, D] as rows [B * T, H, D] in our order."""
    return case.tensor(name, dtype).transpose(1, 2).flatten(0, 1)[..., order]


def test_scores_use_the_rotation():
    (q, k, v), angles, starts, longest = example([2], heads=1, extra=0)
    scores = torch.einsum("ihp,jhp->ij", naive.rotation(q, angles), naive.rotation(k, angles)) / math.sqrt(8)
    eye = torch.eye(2, 8, dtype=q.dtype)[:, None]
    out = attention(q, k, eye, angles, starts, longest)
    torch.testing.assert_close(out[:, 0, :2], scores.softmax(-1))


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        ({"k": torch.zeros(8, 2, 4)}, ["[8, 2, 4]", "8, 2, 8"]),
        ({"angles": torch.zeros(8, 8)}, ["[8, 8]", "8, 4"]),
        ({"max_tokens": 3}, ["4", "3"]),
        ({"cu_tokens": torch.tensor([0, 4, 9])}, ["9", "8"]),
        ({"dropout": 1.0}, ["1.0"]),
        ({"first_head": 3, "all_heads": 4}, ["3 to 4", "4 heads"]),
    ],
)
def test_wrong_arguments_are_named(change, numbers):
    arguments = {
        "q": torch.zeros(8, 2, 8),
        "k": torch.zeros(8, 2, 8),
        "v": torch.zeros(8, 2, 8),
        "angles": torch.zeros(8, 4),
        "cu_tokens": torch.tensor([0, 4, 8]),
        "max_tokens": 4,
    } | change
    with pytest.raises(ValueError) as error:
        attention(**arguments)
    assert all(number in str(error.value) for number in numbers)
