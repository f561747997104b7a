"""Packed variable-length bidirectional attention with rotary positions (maths: README.md beside this file)."""

from __future__ import annotations

from torch import Tensor

from exlm_dist.kernels.attention.angles import rotary_angles
from exlm_dist.kernels.attention.mask import DropoutMask
from exlm_dist.kernels.backend import implementation
from exlm_dist.kernels.checks import check_segments, check_shape

__all__ = ["attention", "attention_packed", "rotary_angles"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: Tensor,
    cu_tokens: Tensor,
    max_tokens: int,
    *,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    site: int = 0,
    first_head: int = 0,
    all_heads: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of each sequence to itself; q and k are rotated by `angles` first.

    q, k, v [T, H, P]; angles [T, P/2] fp32, which rotate components j and j + P/2 as a pair (rotate-half);
    cu_tokens [B+1] int64; max_tokens the longest sequence (python int). Scale P^-0.5, softmax in fp32.
    dropout is the probability that an attention weight is zeroed; the same `seed` and `site` give the same mask
    (`kernels.randomness`). Where the heads are first_head.. of all_heads of a layer (None: H), their masks are those
    that the whole layer would give them.
    Returns [T, H, P] in the type of q; tokens past cu_tokens[-1] give 0. ValueError on shapes that do not fit.
    Source: Su et al. 2021 (rotary), ExLM (arXiv 2501.13397) section 3 (two-dimensional form).
    """
    _check(q, k, v, angles, cu_tokens, max_tokens, dropout)
    mask = _mask(q.shape[1], dropout, seed, site, first_head, all_heads)
    return implementation("attention", backend, q.device).attention(q, k, v, angles, cu_tokens, max_tokens, mask)


def attention_packed(
    qkv: Tensor,
    angles: Tensor,
    cu_tokens: Tensor,
    max_tokens: int,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    site: int = 0,
    first_head: int = 0,
    all_heads: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """`attention` of `qkv.unbind(2)`, qkv [T, H, 3, P]; its gradient is written as one tensor, without a copy.

    `bias`, H * 3 * P elements that have been added to every row of qkv (`kernels.linear.BiasPassingLinear`), gets its
    gradient from the passes that make qkv's; its values are not read.
    """
    check_shape("qkv", qkv, (None, None, 3, None))
    if bias is not None:
        check_shape("bias", bias.flatten(), (qkv[0].numel(),))
    q, k, v = qkv.unbind(2)
    _check(q, k, v, angles, cu_tokens, max_tokens, dropout)
    mask = _mask(q.shape[1], dropout, seed, site, first_head, all_heads)
    chosen = implementation("attention", backend, qkv.device)
    return chosen.attention_packed(qkv, bias, angles, cu_tokens, max_tokens, mask)


def _mask(
    heads: int, probability: float, seed: int | Tensor, site: int, first_head: int, all_heads: int | None
) -> DropoutMask:
    """The mask of `heads` local heads; ValueError where they are not among all heads."""
    mask = DropoutMask(probability, seed, site, first_head, heads if all_heads is None else all_heads)
    if not 0 <= first_head <= mask.all_heads - heads:
        raise ValueError(f"heads {first_head} to {first_head + heads - 1} are not among {mask.all_heads} heads")
    return mask


def _check(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, cu_tokens: Tensor, max_tokens: int, dropout: float) -> None:
    """ValueError on shapes that do not fit, or a dropout probability out of range."""
    check_shape("q", q, (None, None, None))
    tokens, heads, width = q.shape
    if width % 2:
        raise ValueError(f"head width {width} is odd; rotary positions rotate pairs, so it must be divisible by 2")
    check_shape("k", k, (tokens, heads, width))
    check_shape("v", v, (tokens, heads, width))
    check_shape("angles", angles, (tokens, width // 2))
    check_segments("cu_tokens", cu_tokens, tokens, max_tokens)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}, expected at least 0 and below 1")
