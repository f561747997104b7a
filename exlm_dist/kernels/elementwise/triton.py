"""Triton form of what lies between the matrix products: tensors are read once and written once, no mask is kept.

Whether dropout keeps an element is a hash of (seed, site, first_row + row, column): the backward pass, a second forward
pass, or another rank with other rows of the same tensor, arrives at the same mask. Letters: R rows (tokens), W width.
Names: o_ offsets, b_ loaded tile, m_ mask.
Gradients of weights and biases are summed by a fixed number of programs, then over these in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from exlm_dist.kernels.launch import cdiv, launch, next_power_of_2
from exlm_dist.kernels.randomness import seed_tensor
from exlm_dist.kernels.randomness.triton import extended, key_of

#: Programs of a backward pass with parameter gradients: about eight for each multiprocessor of a large GPU.
PROGRAMS = 1024
#: Of the gelu's backward pass: most programs (a large GPU runs 1,320 at once), fewest rows of one, and the tile: a row
#: is 512 bytes in 16 bits, and eight elements per thread leave room for 40 warps on a multiprocessor.
GELU_PROGRAMS, GELU_SPAN = 8192, 32
GELU_ROWS, GELU_COLUMNS = 4, 256
DROP_BITS = 24


@triton.jit
def _kept(key, row, o_column, dropped):
    """Whether elements (row, o_column) are kept: 24 bits of a hash against dropped / 2^24. `key` as from `key_of`."""
    return (extended(extended(key, row), o_column) >> 8).to(tl.int32) >= dropped


@triton.jit(do_not_specialize=["rows", "first_row", "site", "dropped"])
def add_norm_kernel(
    branch, residual,  # [R, W] in; either may be absent
    weight, bias,  # [W] in
    hidden, normed,  # [R, W] out: residual + dropout(branch), and its LayerNorm
    mean, scale,  # [R] fp32 out: of the LayerNorm
    rows, first_row, seed, site, dropped, dropout_scale, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    BRANCH: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """One program: one row."""
    row = tl.program_id(0)
    o_column = tl.arange(0, BLOCK)
    inside = o_column < WIDTH
    o_out = row.to(tl.int64) * WIDTH + o_column
    b_sum = tl.zeros([BLOCK], tl.float32)
    if RESIDUAL:
        b_sum = tl.load(residual + o_out, mask=inside, other=0.0).to(tl.float32)
    if BRANCH:
        b_branch = tl.load(branch + o_out, mask=inside, other=0.0).to(tl.float32)
        if DROPOUT:
            key = key_of(seed, site)
            kept = _kept(key, first_row + row, o_column, dropped)
            b_branch = tl.where(kept, b_branch * dropout_scale, 0.0)
        b_sum = (b_sum + b_branch).to(hidden.dtype.element_ty)
        tl.store(hidden + o_out, b_sum, mask=inside)
        b_sum = b_sum.to(tl.float32)
    if NORM:
        b_mean = tl.sum(b_sum, 0) / WIDTH
        b_centred = tl.where(inside, b_sum - b_mean, 0.0)
        b_scale = 1 / tl.sqrt(tl.sum(b_centred * b_centred, 0) / WIDTH + eps)
        b_weight = tl.load(weight + o_column, mask=inside, other=0.0).to(tl.float32)
        b_bias = tl.load(bias + o_column, mask=inside, other=0.0).to(tl.float32)
        b_out = b_centred * b_scale * b_weight + b_bias
        tl.store(normed + o_out, b_out.to(normed.dtype.element_ty), mask=inside)
        tl.store(mean + row, b_mean)
        tl.store(scale + row, b_scale)


@triton.jit(do_not_specialize=["rows", "first_row", "site", "dropped"])
def add_norm_gradient_kernel(
    hidden, weight, mean, scale,  # as `add_norm_kernel` left them
    grad_normed, grad_hidden,  # [R, W] in; the second may be absent
    grad_residual, grad_branch,  # [R, W] out
    weight_sums, bias_sums,  # [programs, W] fp32 out
    rows, first_row, seed, site, dropped, dropout_scale,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BRANCH: tl.constexpr, PASSED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """One program: rows program, program + programs, ...; grad_branch only if it differs from grad_residual."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    o_column = tl.arange(0, BLOCK)
    inside = o_column < WIDTH
    b_weight = tl.load(weight + o_column, mask=inside, other=0.0).to(tl.float32)
    b_weight_sum = tl.zeros([BLOCK], tl.float32)
    b_bias_sum = tl.zeros([BLOCK], tl.float32)
    if DROPOUT:
        key = key_of(seed, site)
    for row in range(program, rows, programs):
        o_row = tl.cast(row, tl.int64) * WIDTH + o_column
        b_grad = tl.load(grad_normed + o_row, mask=inside, other=0.0).to(tl.float32)
        b_hidden = tl.load(hidden + o_row, mask=inside, other=0.0).to(tl.float32)
        b_scale = tl.load(scale + row)
        b_unit = tl.where(inside, (b_hidden - tl.load(mean + row)) * b_scale, 0.0)
        b_weight_sum += b_grad * b_unit
        b_bias_sum += b_grad
        b_grad = b_grad * b_weight
        b_along = tl.sum(b_grad * b_unit, 0) / WIDTH
        b_grad = (b_grad - tl.sum(b_grad, 0) / WIDTH - b_unit * b_along) * b_scale
        if PASSED:
            b_grad += tl.load(grad_hidden + o_row, mask=inside, other=0.0).to(tl.float32)
        b_grad = b_grad.to(grad_residual.dtype.element_ty)
        tl.store(grad_residual + o_row, b_grad, mask=inside)
        if BRANCH and DROPOUT:
            kept = _kept(key, first_row + tl.cast(row, tl.int32), o_column, dropped)
            b_branch = tl.where(kept, b_grad.to(tl.float32) * dropout_scale, 0.0)
            tl.store(grad_branch + o_row, b_branch.to(grad_branch.dtype.element_ty), mask=inside)
    o_sum = program * WIDTH + o_column
    tl.store(weight_sums + o_sum, b_weight_sum, mask=inside)
    tl.store(bias_sums + o_sum, b_bias_sum, mask=inside)


@triton.jit(do_not_specialize=["rows", "span"])
def gelu_gradient_kernel(
    grad, x,  # [R, W]; grad: that of the exact (erf) gelu(x), which becomes that of x
    activated,  # [R, W] out: gelu(x), computed again
    sums,  # [programs, W] fp32 out: of the new grad over the rows of each program
    rows, span,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: a block of columns of rows [program * span, (program + 1) * span), ROWS of them at a time."""
    program = tl.program_id(1)
    o_row = tl.arange(0, ROWS)[:, None]
    o_column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = o_column < WIDTH
    o_tile = o_row * WIDTH + o_column
    b_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(program * span, tl.minimum((program + 1) * span, rows), ROWS):
        start = tl.cast(first, tl.int64) * WIDTH
        m_tile = inside & (o_row < rows - first)
        b_x = tl.load(x + start + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_grad = tl.load(grad + start + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_cdf = 0.5 + 0.5 * tl.erf(b_x * 0.7071067811865476)
        b_slope = b_cdf + b_x * tl.exp(-0.5 * b_x * b_x) * 0.3989422804014327
        b_grad = b_grad * b_slope
        b_sum += b_grad
        tl.store(activated + start + o_tile, (b_x * b_cdf).to(activated.dtype.element_ty), mask=m_tile)
        tl.store(grad + start + o_tile, b_grad.to(grad.dtype.element_ty), mask=m_tile)
    o_sum = program * WIDTH + o_column
    tl.store(sums + o_sum, tl.sum(b_sum, 0)[None, :], mask=inside)


def dropout_add(
    branch: Tensor, residual: Tensor | None, *, dropout: float, seed: int | Tensor, site: int, first_row: int
) -> Tensor:
    """See `exlm_dist.kernels.elementwise.dropout_add`."""
    return _DropoutAdd.apply(branch, residual, (dropout, seed, site, first_row))


def add_norm(
    branch: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout: float,
    seed: int | Tensor,
    site: int,
    first_row: int,
) -> tuple[Tensor, Tensor]:
    """See `exlm_dist.kernels.elementwise.add_norm`."""
    return _AddNorm.apply(branch, residual, weight, bias, eps, (dropout, seed, site, first_row))


def gelu_gradient_(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """See `exlm_dist.kernels.elementwise.gelu_gradient_`."""
    rows, width = x.shape
    blocks, tiles = cdiv(width, GELU_COLUMNS), cdiv(rows, GELU_ROWS)
    span = max(GELU_SPAN, GELU_ROWS * cdiv(tiles * blocks, GELU_PROGRAMS))
    programs = cdiv(rows, span)
    activated = torch.empty_like(x)
    sums = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    launch(
        gelu_gradient_kernel,
        (blocks, programs),
        {"grad": grad, "x": x, "activated": activated, "sums": sums, "rows": rows, "span": span},
        {"WIDTH": width, "ROWS": GELU_ROWS, "COLUMNS": GELU_COLUMNS},
    )
    return activated, sums.sum(0).to(x.dtype)


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, branch, residual, key):
        ctx.key, ctx.has_residual = key, residual is not None
        return _dropped(branch, residual, key)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _dropped(grad, None, ctx.key), grad if ctx.has_residual else None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, branch, residual, weight, bias, eps, key):
        residual = residual.contiguous()
        rows, width = residual.shape
        hidden = residual if branch is None else torch.empty_like(residual)
        normed = torch.empty_like(residual)
        mean, scale = torch.empty((2, rows), dtype=torch.float32, device=residual.device)
        if branch is not None:
            branch = branch.contiguous()
        _forward(branch, residual, weight, bias, hidden, normed, mean, scale, eps, key)
        ctx.save_for_backward(hidden, weight, mean, scale)
        ctx.settings = (branch is not None, key)
        ctx.set_materialize_grads(False)
        # Without a branch the residual itself is returned, so that one pass over the memory sums both its gradients.
        return hidden, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_hidden, grad_normed):
        hidden, weight, mean, scale = ctx.saved_tensors
        has_branch, key = ctx.settings
        rows, width = hidden.shape
        if grad_normed is None:
            grad_normed = torch.zeros_like(hidden)
        programs = max(1, min(PROGRAMS, rows))
        sums = torch.empty((2, programs, width), dtype=torch.float32, device=hidden.device)
        grad_residual = torch.empty_like(hidden)
        dropped = has_branch and key[0] > 0
        grad_branch = torch.empty_like(hidden) if dropped else grad_residual
        launch(
            add_norm_gradient_kernel,
            (programs,),
            {"hidden": hidden, "weight": weight, "mean": mean, "scale": scale, "grad_normed": grad_normed.contiguous(),
             "grad_hidden": None if grad_hidden is None else grad_hidden.contiguous(), "grad_residual": grad_residual,
             "grad_branch": grad_branch, "weight_sums": sums[0], "bias_sums": sums[1], "rows": rows,
             **_key(hidden.device, *key)},
            {"WIDTH": width, "BLOCK": next_power_of_2(width), "BRANCH": has_branch,
             "PASSED": grad_hidden is not None, "DROPOUT": key[0] > 0},
            warps=_warps(width),
        )  # fmt: skip
        grad_weight, grad_bias = sums.sum(1).to(weight.dtype)
        return grad_branch if has_branch else None, grad_residual, grad_weight, grad_bias, None, None


def _dropped(branch: Tensor, residual: Tensor | None, key: tuple[float, int | Tensor, int, int]) -> Tensor:
    branch = branch.contiguous()
    out = torch.empty_like(branch)
    residual = None if residual is None else residual.contiguous()
    _forward(branch, residual, None, None, out, None, None, None, 0.0, key)
    return out


def _forward(branch, residual, weight, bias, hidden, normed, mean, scale, eps, key) -> None:
    rows, width = hidden.shape
    launch(
        add_norm_kernel,
        (rows,),
        {"branch": branch, "residual": residual, "weight": weight, "bias": bias, "hidden": hidden, "normed": normed,
         "mean": mean, "scale": scale, "rows": rows, **_key(hidden.device, *key), "eps": eps},
        {"WIDTH": width, "BLOCK": next_power_of_2(width), "BRANCH": branch is not None,
         "RESIDUAL": residual is not None, "NORM": normed is not None, "DROPOUT": key[0] > 0},
        warps=_warps(width),
    )  # fmt: skip


def _key(device: torch.device, dropout: float, seed: int | Tensor, site: int, first_row: int) -> dict[str, object]:
    """Arguments that decide the mask. The dropout probability is rounded to 2^-24, and the scale follows it."""
    dropped = round(dropout * 2**DROP_BITS)
    return {"first_row": first_row, "seed": seed_tensor(seed, device) if dropout else None, "site": site,
            "dropped": dropped, "dropout_scale": 2**DROP_BITS / (2**DROP_BITS - dropped)}  # fmt: skip


def _warps(width: int) -> int:
    return 4 if width <= 1024 else 8
