"""Ranks that see different devices end at once, all with the same reason."""

from __future__ import annotations

import pytest
import torch
from parallel.harness import RankFailed, run_processes

from exlm_dist.parallel.devices import Found, choose_device, judge
from exlm_dist.utils.errors import EXIT_USAGE, ConfigError


class FakeGpu:
    """What torch says of a GPU."""

    uuid = "GPU-7"


def pretend(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_the_device_of_a_rank(monkeypatch):
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    pretend(monkeypatch, 8)
    assert choose_device("auto", 7) == torch.device("cuda", 7) and choose_device("cpu", 3).type == "cpu"
    with pytest.raises(ConfigError, match="at most 8"):
        choose_device("cuda", 8)
    pretend(monkeypatch, 1)
    assert choose_device("auto", 5) == torch.device("cuda", 0)  # a task that sees its own alone
    pretend(monkeypatch, 0)
    assert choose_device("auto", 0).type == "cpu"
    with pytest.raises(ConfigError, match="launch.device is cuda"):
        choose_device("cuda", 0)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(ConfigError, match="Slurm has given 8 GPUs"):
        choose_device("auto", 0)


def test_which_ranks_fit_together():
    assert judge([Found("a", ""), Found("b", "")]) == ""
    assert judge([Found("a", "1"), Found("a", "2"), Found("b", "1")]) == ""
    assert "2 of 3 ranks see no GPU, those on b, c" in judge([Found("a", "1"), Found("b", ""), Found("c", "")])
    assert "--exclude=b" in judge([Found("a", "1"), Found("b", ""), Found("b", "")])
    assert "ranks 0 and 2 on a have the same GPU (1)" in judge([Found("a", "1"), Found("b", "1"), Found("a", "1")])
    assert judge([Found("a", ""), Found("b", "", "no driver")]) == "rank 1 on b: no driver"


def use(device):
    if device.index == 2:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nMore about it")


def start_with_gpus(rank, seen):
    """Join as a rank that sees so many GPUs."""
    from exlm_dist.config.schema import LaunchConfig
    from exlm_dist.parallel import process as processes

    torch.cuda.is_available, torch.cuda.device_count = (lambda: seen[rank] > 0), (lambda: seen[rank])
    torch.cuda.set_device, torch.cuda.get_device_properties = use, (lambda device: FakeGpu)
    processes.start(LaunchConfig(timeout=60))


@pytest.mark.parametrize(
    "seen, environment, words",
    [
        ([2, 2, 0], {}, "1 of 3 ranks see no GPU"),
        ([1, 1, 1], {}, "ranks 0 and 1 on"),
        ([4, 4, 4], {}, "its GPU cannot be used: CUDA error: uncorrectable ECC error"),
        ([0, 0, 0], {"SLURM_GPUS_ON_NODE": "8"}, "Slurm has given 8 GPUs"),
    ],
)
def test_all_ranks_end_with_the_same_reason_long_before_the_timeout(seen, environment, words):
    with pytest.raises(RankFailed) as caught:
        run_processes(start_with_gpus, 3, seen, environment=environment, timeout=30)
    assert caught.value.codes == [EXIT_USAGE] * 3 and str(caught.value).count(words) >= 3, caught.value
