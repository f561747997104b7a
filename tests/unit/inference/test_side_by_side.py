"""Micro-batches on all cores: in order, without gradients, one thread each, and torch as it was afterwards."""

from __future__ import annotations

import threading

import pytest
import torch

from exlm_dist.inference.side_by_side import on_cores

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_are_in_order_and_without_gradients(threads):
    weight = torch.ones(2, requires_grad=True)

    def product(number: int) -> tuple[int, torch.Tensor]:
        return torch.get_num_threads(), weight * number

    results = list(on_cores(product, range(50), CPU))
    assert [float(value[0]) for _, value in results] == list(range(50))
    assert not any(value.requires_grad for _, value in results)
    assert {number for number, _ in results} == {1}
    assert torch.get_num_threads() == threads and torch.is_grad_enabled()


def test_a_single_one_has_all_threads(threads):
    assert list(on_cores(lambda _: torch.get_num_threads(), [0], CPU)) == [threads]
    assert list(on_cores(lambda _: 0, [], CPU)) == []


def test_as_many_at_a_time_as_torch_has_threads(threads):
    meeting = threading.Barrier(threads, timeout=60)
    assert len(list(on_cores(lambda _: meeting.wait(), range(4 * threads), CPU))) == 4 * threads


def test_few_wait_to_be_taken(threads):
    started = []
    results = on_cores(started.append, range(1000), CPU)
    next(results)
    results.close()
    assert len(started) <= 2 * threads + 1 and torch.get_num_threads() == threads


def test_an_error_ends_it(threads):
    done = []

    def divide(number: int) -> float:
        done.append(number)
        return 1 / (5 - number)

    with pytest.raises(ZeroDivisionError):
        list(on_cores(divide, range(1000), CPU))
    assert len(done) < 20 and torch.get_num_threads() == threads
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("core")]
