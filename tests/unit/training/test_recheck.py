"""Who miscalculated, by digests; and that digests see every bit."""

from __future__ import annotations

import pytest
import torch

from exlm_dist.training.engine import digest as digests
from exlm_dist.training.engine.digest import GradientDigest, tensor_digest
from exlm_dist.training.recheck import EXCLUDED, exclude, judge

RIGHT, WRONG, OTHER = 1, 2, 3


@pytest.mark.parametrize(
    "claims, fresh, members, certain, again",
    [
        # One replica: computed three times, the odd one out is the fault.
        ([(0, WRONG), (0, RIGHT)], [RIGHT], {0}, True, False),
        ([(0, RIGHT), (0, WRONG)], [RIGHT], {0}, True, False),
        # Two: a fault that does not come again is told; one that does is not.
        ([(0, WRONG), (1, RIGHT)], [RIGHT, RIGHT], {0}, True, False),
        ([(0, RIGHT), (1, WRONG)], [RIGHT, RIGHT], {1}, True, False),
        ([(0, RIGHT), (1, WRONG)], [RIGHT, WRONG], {0, 1}, False, True),
        ([(0, RIGHT), (1, WRONG)], [RIGHT, OTHER], {1}, True, False),
        # Three and more: the majority decides, also over replicas that were not compared.
        ([(0, RIGHT), (1, WRONG)], [RIGHT, WRONG, RIGHT], {1}, True, True),
        ([(1, WRONG), (2, RIGHT)], [RIGHT, RIGHT, RIGHT], {1}, True, False),
        ([(0, RIGHT), (1, WRONG)], [RIGHT, WRONG, RIGHT, OTHER, RIGHT], {1, 3}, True, True),
        ([(0, RIGHT), (1, WRONG)], [RIGHT, WRONG, RIGHT, WRONG], {0, 1, 2, 3}, False, True),
        # Nothing disputed, as on the other tensor ranks of a replica.
        ([(0, RIGHT), (1, RIGHT)], [RIGHT, RIGHT], set(), True, False),
    ],
)
def test_who_is_at_fault(claims, fresh, members, certain, again):
    verdict = judge(claims, fresh)
    assert (verdict.members, verdict.certain, verdict.again) == (members, certain, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_flipped_bit_and_any_exchange_changes_the_digest(dtype, monkeypatch):
    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = int(tensor_digest(tensor))
    monkeypatch.setattr(digests, "_CHUNK", 4)
    assert int(tensor_digest(tensor)) == before == int(tensor_digest(tensor.t().contiguous().t()))
    bits = tensor.view(digests._BITS[tensor.element_size()]).view(-1)
    for place in range(len(bits)):
        for bit in range(8 * tensor.element_size() - 1):
            bits[place] ^= 1 << bit
            assert int(tensor_digest(tensor)) != before
            bits[place] ^= 1 << bit
    assert int(tensor_digest(tensor.flip(0))) != before


def test_a_pass_whose_gradient_is_not_wanted_has_the_digest_of_one_that_is():
    weight, bias = torch.randn(4, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    values = []
    for discard in (False, True):
        loss = torch.nn.functional.linear(torch.ones(2, 3), weight, bias).square().sum()
        digest = GradientDigest([weight, bias], discard=discard)
        with digest.of(loss):
            found = torch.autograd.grad(loss, [weight, bias])
        values.append(digest.value())
        assert all(bool(gradient.any()) is not discard for gradient in found)
    assert values[0] == values[1]


def test_hosts_are_excluded_once_each(tmp_path):
    exclude(tmp_path, ["n2"])
    exclude(tmp_path, ["n1", "n2"])
    assert (tmp_path / EXCLUDED).read_text() == "n2\nn1\n"
