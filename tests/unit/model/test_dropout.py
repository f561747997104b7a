from __future__ import annotations

import pytest
import torch

from exlm_dist.kernels.elementwise.torch import keep_mask
from exlm_dist.kernels.randomness import seed_tensor, site_seed
from exlm_dist.model.dropout import EMBEDDING_SITE, block_site, dropout, dropout_add


def test_mask_depends_on_the_key_alone():
    shape = torch.Size((33, 7))
    first, _ = keep_mask(shape, 0.3, site_seed(5, 2), torch.device("cpu"))
    torch.manual_seed(99)
    again, _ = keep_mask(shape, 0.3, site_seed(torch.tensor([5]), 2), torch.device("cpu"))
    assert torch.equal(first, again)
    others = [site_seed(6, 2), site_seed(5, 3)]
    assert all(not torch.equal(first, keep_mask(shape, 0.3, seed, torch.device("cpu"))[0]) for seed in others)


@pytest.mark.parametrize("first_row", [0, 3])
def test_mask_is_16_bits_of_the_generator_for_each_element(first_row):
    shape, probability = torch.Size((5, 7)), 0.3
    found, _ = keep_mask(shape, probability, 11, torch.device("cpu"), first_row)
    words = torch.empty((8 * 7 + 3) // 4, dtype=torch.int64)
    words.random_(-(2**63), None, generator=torch.Generator().manual_seed(11))
    numbers = words.view(torch.int16)[first_row * 7 : (first_row + 5) * 7].view(shape)
    assert found.dtype == torch.bool
    dropped = round(probability * 65536)
    assert found.tolist() == [[value + 32768 >= dropped for value in row] for row in numbers.tolist()]


def test_every_dropout_has_a_site_of_its_own():
    sites = [block_site(layer, name) for layer in range(3) for name in ("weights", "attention", "ffn")]
    assert len({EMBEDDING_SITE, *sites}) == 10


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, 2**64 - 2, -5])
def test_seeds_of_64_bits(seed):
    found = seed_tensor(seed, torch.device("cpu"))
    assert found.shape == (1,) and int(found) % 2**64 == seed % 2**64
    assert seed_tensor(found, found.device) is found


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9, 0.99999])
def test_fraction_and_scale(probability):
    keep, scale = keep_mask(torch.Size((1 << 20,)), probability, 3, torch.device("cpu"))
    kept = 1 / scale
    assert abs(kept - (1 - probability)) <= 2**-16
    assert abs(keep.double().mean() - kept) < 5 * (probability * (1 - probability) / (1 << 20)) ** 0.5 + 1e-9


def test_masks_of_neighbours_are_independent():
    keep, _ = keep_mask(torch.Size((1 << 20,)), 0.5, 11, torch.device("cpu"))
    signs = keep.double() * 2 - 1
    for lag in (1, 2, 3, 4, 8, 256):
        assert abs((signs[lag:] * signs[:-lag]).mean()) < 5e-3


def test_values_and_gradients():
    x, residual = (torch.randn(50, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    keep, scale = keep_mask(x.shape, 0.25, site_seed(7, 4), x.device)
    assert torch.allclose(dropout_add(x, residual, 0.25, 7, 4), residual + x * keep * scale)
    assert torch.allclose(dropout(x, 0.25, 7, 4), x * keep * scale)
    assert torch.autograd.gradcheck(lambda a, b: dropout_add(a, b, 0.25, 7, 4), (x, residual))
    assert torch.autograd.gradcheck(lambda a: dropout(a, 0.25, 7, 4), (x,))


def test_zero_is_the_identity():
    x = torch.randn(4, 3)
    assert dropout(x, 0.0, 1, 0) is x
    assert torch.equal(dropout_add(x, x, 0.0, 1, 0), x + x)
