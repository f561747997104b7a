"""Who miscalculated, by digests; and that digests see every bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from exlm_dist.config import RunConfig, check_config
from exlm_dist.training.engine import digest as digests
from exlm_dist.training.engine.digest import GradientDigest, tensor_digest
from exlm_dist.training.engine.zero_engine import ZeroEngine
from exlm_dist.training.recheck import AUTO_STEPS, EXCLUDED, Recheck, exclude, judge
from exlm_dist.utils.errors import ConfigError

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


class Ranks:
    """What `Recheck.of` asks of a `Process`: hosts and kinds of device of all ranks, and the tensor degree."""

    def __init__(self, found: list[tuple[str, str]], tensor: int = 1) -> None:
        self.device, self._found = torch.device("cpu"), found
        self.grid = SimpleNamespace(tensor=SimpleNamespace(size=tensor))

    def all_gather_object(self, value: object) -> list:
        return [list(one) for one in self._found]


@pytest.mark.parametrize(
    "recheck, ranks, every",
    [
        ("auto", Ranks([("n1", "H100"), ("n1", "H100")]), None),
        ("auto", Ranks([("n1", "H100"), ("n2", "H100")]), AUTO_STEPS),
        ("auto", Ranks([("n1", "H100"), ("n2", "A100")]), None),
        ("auto", Ranks([("n1", "H100"), ("n2", "H100")], tensor=4), None),
        (0, Ranks([("n1", "H100"), ("n2", "H100")]), None),
        (7, Ranks([("n1", "H100")]), 7),
    ],
)
def test_when_it_is_on(recheck, ranks, every, tmp_path):
    found = Recheck.of(config_of(recheck), ranks, engine(), None, tmp_path, None)
    assert (found and found.every) == every


def test_several_kinds_of_device_are_refused(tmp_path):
    ranks = Ranks([("n1", "H100"), ("n2", "A100")])
    with pytest.raises(ConfigError, match=r"A100 on n2; H100 on n1\). Set launch.recheck 0"):
        Recheck.of(config_of(7), ranks, engine(), None, tmp_path, None)


def test_stages_are_refused():
    with pytest.raises(ConfigError, match=r"launch.recheck 5 with parallel.pipeline 2"):
        check_config(config_of(5, parallel={"pipeline": 2}))
    check_config(config_of("auto", parallel={"pipeline": 2}))


def config_of(recheck: object, **sections: object) -> RunConfig:
    plain = {"name": "x", "data": {"path": "x"}, "schedule": {"steps": 9}, "launch": {"recheck": recheck}}
    return RunConfig.model_validate(plain | sections)


def engine() -> ZeroEngine:
    return object.__new__(ZeroEngine)
