"""The DeepSpeed dictionary, and precisions that a device does not have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from made_run import make_config

from exlm_dist.parallel.layout import Layout
from exlm_dist.parallel.process import Process, threads
from exlm_dist.parallel.process_groups import Grid, ParallelGroup
from exlm_dist.training.engine.deepspeed_config import adamw_options, deepspeed_config, working_dtype
from exlm_dist.utils.errors import ConfigError

TWO_REPLICAS = Grid(
    Layout(data=2), tensor=(one := ParallelGroup(0, 1, None)), pipeline=one, data=ParallelGroup(0, 2, None), model=one
)
CPU = Process(0, 2, 0, torch.device("cpu"), None, TWO_REPLICAS)


def config(tmp_path, **sections):
    return make_config(tmp_path, "x", tmp_path, batch={"sequences": 16, "micro": 2}, **sections)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_batch_sizes_agree_and_buckets_fit_the_model(tmp_path, zero):
    made = deepspeed_config(config(tmp_path, parallel={"zero": zero, "offload": True}), CPU, torch.float32, 5000)
    assert (
        made["train_batch_size"]
        == 2 * made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"]
        == 16
    )
    assert made["zero_optimization"]["stage"] == zero and made["zero_optimization"]["reduce_bucket_size"] == 5120
    assert made["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert "bf16" not in made and "fp16" not in made and "optimizer" not in made


def test_bf16_accumulates_in_fp32(tmp_path):
    made = deepspeed_config(config(tmp_path), CPU, torch.bfloat16, 10**9)
    assert (
        made["communication_data_type"] == "fp32"
        and made["bf16"] == {"enabled": True, "immediate_grad_update": True}
        and made["data_types"] == {"grad_accum_dtype": "fp32"}
    )
    assert made["zero_optimization"]["reduce_bucket_size"] == 50_000_000


def test_dtypes(tmp_path):
    assert working_dtype(config(tmp_path), torch.device("cpu")) == torch.float32
    assert working_dtype(config(tmp_path, precision={"dtype": "bf16"}), torch.device("cpu")) == torch.bfloat16
    with pytest.raises(ConfigError, match="not supported on a CPU"):
        working_dtype(config(tmp_path, precision={"dtype": "fp16"}), torch.device("cpu"))
    with pytest.raises(ConfigError, match="parallel.zero 1"):
        working_dtype(config(tmp_path, precision={"dtype": "fp16"}, parallel={"zero": 0}), torch.device("cuda"))


def test_adamw_is_fused_on_a_gpu_only(tmp_path):
    assert adamw_options(config(tmp_path), torch.device("cuda"))["fused"] is True
    assert adamw_options(config(tmp_path), torch.device("cpu"))["fused"] is None
    assert adamw_options(config(tmp_path, parallel={"offload": True}), torch.device("cuda"))["fused"] is None


def test_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert threads(3, 2) == 3 and threads(0, 2) == 4 and threads(0, 16) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads(0, 2) == 5


def test_the_timer_of_the_micro_batches_does_not_wait_for_the_device(tmp_path, monkeypatch):
    from deepspeed.utils import timer
    from deepspeed.utils.config import get_timers_config

    waits = []
    monkeypatch.setattr(timer, "get_accelerator", lambda: SimpleNamespace(synchronize=lambda: waits.append(1)))

    def measure(settings: dict) -> int:
        waits.clear()
        throughput = timer.ThroughputTimer(get_timers_config(settings), batch_size=2)
        for _ in range(5):
            throughput.start()
            throughput.stop(global_step=True)
        return len(waits)

    assert measure({}) > 0
    assert measure(deepspeed_config(config(tmp_path), CPU, torch.float32, 5000)) == 0
