"""Memory of a rank: its parts, how it falls with the layout, and peaks recorded on an H100."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from exlm_dist.config.schema import ModelConfig, RunConfig
from exlm_dist.model.cost import count_parameters
from exlm_dist.planning import activations, memory
from exlm_dist.planning.job import Job, parameters_of_stage
from exlm_dist.planning.memory import COPY, HOST, memory_per_rank, moments_of_stage

ROOT = Path(__file__).resolve().parents[3]
VOCABULARY = 50_265
WIDE = {"layers": 24, "width": 2048, "heads": 16, "ffn": 8192}
PLAIN = {"objective": "mlm", "states": 1, "anchors": False, "transitions": "uniform"}


def job(
    *, gpu: bool = True, data: int = 1, length: int = 512, model: dict | None = None, micro: int = 4,
    accumulation: int = 1, bucket: int = 1, dtype: str = "auto", vocabulary: int = VOCABULARY, **parallel,
) -> Job:  # fmt: skip
    config = RunConfig(
        name="x",
        data={"path": "nowhere", "bucket": bucket},
        schedule={"steps": 10},
        model=WIDE if model is None else model,
        batch={"sequences": micro * data * accumulation, "micro": micro},
        parallel={"data": data, **parallel},
        precision={"dtype": dtype},
    )
    ranks = data * config.parallel.tensor * config.parallel.pipeline
    return Job(config, vocabulary, length, ranks, gpu)


def total(**settings) -> float:
    return memory_per_rank(job(**settings)).total


@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "cpu"])
@pytest.mark.parametrize("changes", [{}, {"zero": 3}, {"activation_checkpointing": True}, {"accumulation": 4}], ids=str)
@pytest.mark.parametrize("kind", [{}, PLAIN, {"transitions": "sparse"}], ids=["dense", "mlm", "sparse"])
def test_more_tensor_parallelism_never_needs_more(gpu, changes, kind):
    sizes = [total(gpu=gpu, data=2, model=WIDE | kind, tensor=tensor, **changes) for tensor in (1, 2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True)


def test_sequence_parallelism_recomputation_and_smaller_batches_need_less():
    base = {"tensor": 4, "data": 2, "micro": 8}
    assert total(**base, sequence=True) < total(**base)
    assert total(**base, activation_checkpointing=True) < total(**base)
    sharded = {"data": 64, "zero": 3, "micro": 16}  # little but activations
    assert total(**sharded, activation_checkpointing=True) < total(**sharded) / 3
    assert total(**{**base, "micro": 4}) < total(**base) < total(**{**base, "length": 1024})


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_zero_stages_are_ordered(dtype, accumulation):
    sizes = [total(data=64, dtype=dtype, accumulation=accumulation, zero=zero, micro=1) for zero in (1, 2, 3)]
    assert sizes == sorted(sizes, reverse=True)
    states = [memory_per_rank(job(data=data, dtype=dtype)).parts["optimizer"] for data in (1, 8)]
    assert states[0] == pytest.approx(8 * states[1])


def test_offload_puts_the_optimizer_on_the_host():
    here, there = (memory_per_rank(job(data=8, offload=offload)) for offload in (False, True))
    assert there.parts[HOST] == here.parts["optimizer"] and "optimizer" not in there.parts
    assert there.total < here.total and there.total == sum(there.parts.values()) - there.parts[HOST] - there.parts[COPY]


def test_the_copy_for_saves_is_split_over_the_data_ranks():
    alone, split = (memory_per_rank(job(data=data)).parts[COPY] for data in (1, 8))
    assert alone == 12 * sum(count_parameters(ModelConfig(**WIDE), VOCABULARY).values()) == 8 * split


def test_stages_partition_the_model():
    """Every parameter once; the tied matrix twice if embedding and output layer are on different stages."""
    for model in (WIDE, {**WIDE, "tie_head": False}, {**WIDE, **PLAIN}, {**WIDE, "transition_positions": False}):
        whole = sum(count_parameters(ModelConfig(**model), VOCABULARY).values())
        one, four = (job(model=model, pipeline=stages) for stages in (1, 4))
        counts = [sum(sum(parameters_of_stage(j, stage).values()) for stage in j.stages) for j in (one, four)]
        second = 0 if model.get("tie_head") is False else VOCABULARY * WIDE["width"]
        assert counts == [whole, whole + second]
        assert sum(stage.blocks for stage in four.stages) == WIDE["layers"]


def test_tensor_ranks_split_the_model():
    one, eight = (job(tensor=tensor) for tensor in (1, 8))
    counts = [sum(parameters_of_stage(j, j.stages[0]).values()) for j in (one, eight)]
    assert counts[0] / 8 < counts[1] < counts[0] / 8 * 1.1


def test_a_stage_keeps_its_micro_batches_in_flight():
    stages = job(pipeline=4, accumulation=16).stages
    assert [stage.in_flight(16) for stage in stages] == [4, 3, 2, 1]
    assert [stage.in_flight(2) for stage in stages] == [2, 2, 2, 1]
    kept = [
        max(parts["activations"] for parts in moments_of_stage(j, j.stages[0]).values() if "activations" in parts)
        for j in (job(pipeline=4, accumulation=m) for m in (1, 2, 3, 4, 5))
    ]
    assert kept == sorted(kept) and kept[2] > 2 * kept[0] and kept[3] == kept[4]


def test_the_peak_is_the_largest_moment_and_its_parts_add_up():
    this = job(gpu=False)
    peak = memory_per_rank(this)
    moments = {
        name: sum(parts.values()) - parts[COPY] for name, parts in moments_of_stage(this, this.stages[0]).items()
    }
    assert peak.total == max(moments.values()) == moments[peak.moment]
    assert {"loss", "reduction", "update", "embedding"} <= set(moments)


@pytest.mark.parametrize("length,sequences", [(128, 512), (512, 128)])
@pytest.mark.parametrize("objective", ["exlm", "mlm"])
def test_peaks_recorded_on_an_h100(objective, length, sequences):
    """`benchmarks/step.py` at the base shape: torch's own peak, bf16 with fp32 copies, one GPU."""
    rows = csv.DictReader((ROOT / "benchmarks/results/step_2026-11-22.csv").open())
    wanted = ("base", str(length), f"{objective} peak memory")
    recorded = [float(row["median"]) for row in rows if (row["shape"], row["length"], row["quantity"]) == wanted][-1]
    model = PLAIN if objective == "mlm" else {}
    predicted = memory_per_rank(
        job(model=model, length=length, micro=sequences, bucket=1024, vocabulary=50_304, zero=0)
    )
    assert predicted.total / 2**20 == pytest.approx(recorded, rel=0.05)


def test_sizes_are_those_of_engine_and_kernels():
    from exlm_dist.kernels.attention import torch as attention
    from exlm_dist.kernels.transitions import torch as transitions
    from exlm_dist.model import feedforward
    from exlm_dist.training.engine import deepspeed_config

    assert memory.BUCKET == deepspeed_config.BUCKET
    blocks = {attention.BLOCK_ELEMENTS, transitions.BLOCK_ELEMENTS, feedforward._BLOCK_ELEMENTS}
    assert blocks == {activations.BLOCK}
