"""What two ranks send in a step, counted at the dispatcher, is what the formulas of `planning/communication.py` say."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest
from parallel.harness import on_ranks

from exlm_dist.config.schema import RunConfig
from exlm_dist.planning.communication import traffic_of_stage
from exlm_dist.planning.job import Job

VOCABULARY, LENGTH, MICRO = 512, 64, 8
MODEL = {"layers": 3, "width": 64, "heads": 4, "ffn": 256, "max_positions": 256}
LAYOUTS = {
    "tp2": {"tensor": 2},
    "tp2 recomputed": {"tensor": 2, "activation_checkpointing": True},
    "tp2 along tokens": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "dp2 zero1": {"data": 2},
    "dp2 zero2": {"data": 2, "zero": 2},
}


def settings(layout: dict, accumulation: int = 2) -> dict:
    replicas = layout.get("data", 1)
    return {
        "name": "x", "data": {"path": "nowhere"}, "schedule": {"steps": 10}, "model": MODEL,
        "batch": {"sequences": MICRO * accumulation * replicas, "micro": MICRO},
        "parallel": {"data": replicas, **layout}, "optimizer": {"clip": 1.0},
    }  # fmt: skip


def counted(process, layout: dict) -> dict[str, float]:
    """Bytes by collective in the second step of this rank. Between stages nothing but one tensor a micro-batch is sent:
    a description of it, or sizes, would be read from the device before the stage can go on."""
    from exlm_dist.parallel.layout import Layout
    from exlm_dist.parallel.process_groups import Grid
    from exlm_dist.parallel.traffic import Traffic
    from exlm_dist.training.engine import build_engine

    config = RunConfig.model_validate(settings(layout))
    grid = Grid.make(Layout.of(config.parallel, process.world), process.rank)
    process = dataclasses.replace(process, grid=grid)
    engine = build_engine(config, process, VOCABULARY, LENGTH)
    for step in range(2):
        batches = [batch(config, step, grid.data.rank * 2 + index) for index in range(2)]
        with Traffic() as traffic:
            engine.train(batches, 32.0, scored=False)
    engine.close()
    assert traffic.calls["send"] == (2 if "pipeline" in layout else 0)
    return {kind: size for kind, size in traffic.bytes.items() if size > 64}  # smaller ones are scalars


def batch(config: RunConfig, step: int, index: int):
    from exlm_dist.data.expansion import expand, wrap
    from exlm_dist.data.masking import mask_batch, sample_keys
    from exlm_dist.data.packing import pack

    lengths, samples, epochs = np.full(MICRO, LENGTH - 2), np.arange(MICRO) + 100 * index, np.full(MICRO, step)
    tokens = np.random.default_rng(index).integers(10, VOCABULARY, lengths.sum())
    masks = mask_batch(tokens, lengths, sample_keys(0, epochs, samples), ratio=0.15, vocab_size=VOCABULARY)
    expanded = expand(wrap(tokens, lengths, masks, anchors=True), 4)
    identity = {"sample_ids": samples, "epochs": epochs, "step": step, "index": index}
    return pack(expanded, 0, MICRO, states=4, bucket=1, **identity)


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_are_those_of_the_formulas(name):
    """To 2 %: the formulas use the expected numbers of tokens and states."""
    layout = LAYOUTS[name]
    job = Job(RunConfig.model_validate(settings(layout)), VOCABULARY, LENGTH, 2)
    for stage, found in zip(job.stages * 2, on_ranks(counted, 2, layout)):
        expected: dict[str, float] = collections.Counter()
        for traffic in traffic_of_stage(job, stage):
            expected[traffic.collective] += traffic.payload
        assert found == pytest.approx(dict(expected), rel=0.02)
