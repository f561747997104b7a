"""The gradient of a global batch does not depend on how ranks, micro-batches and ZeRO stages split it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import full_state
from made_run import make_data
from parallel.harness import on_ranks
from training_runs import tiny

from exlm_dist.config import RunConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "prepared")


def first_step(process, settings):
    """(gradients by name, loss, samples of this rank) of step 0, through the engine's own optimizer state."""
    from exlm_dist.data.loader import Loader
    from exlm_dist.data.order import Order
    from exlm_dist.data.recipe import Recipe
    from exlm_dist.data.shards import ShardDataset
    from exlm_dist.training.engine import build_engine
    from exlm_dist.training.step import optimizer_step

    config = RunConfig.model_validate(settings)
    dataset = ShardDataset.open(config.data.path, "train")
    loader = Loader(
        dataset,
        Recipe.of(config, dataset.vocab_size),
        order=Order.of(config.data, config.seed, len(dataset)),
        global_batch=config.batch.sequences,
        rank=process.rank,
        world=process.world,
        prefetch=0,
    )
    engine = build_engine(config, process, dataset.vocab_size, 20.0)
    batches = loader.step(0)
    samples = sorted(int(sample) for batch in batches.micro_batches for sample in batch.sample_ids)
    result = optimizer_step(engine, batches, config, scored=False).result
    loss = float(process.all_gather([float(result.loss)]).sum())
    state = full_state(engine)
    norm = float(result.grad_norm)
    engine.close()
    gradients = {
        name: value / (1 - config.optimizer.beta1) for name, value in state.items() if name.startswith("exp_avg.")
    }
    return gradients, loss, samples, norm


def measured(config: RunConfig, world: int):
    results = on_ranks(first_step, world, config.model_dump())
    gradients, loss, _, norm = results[0]
    return gradients, loss, sorted(sample for result in results for sample in result[2]), norm


@pytest.mark.parametrize("reduction, dropout", [("sequence", 0.1), ("token", 0.1)])
def test_ranks_times_micro_batches(reduction, dropout, data, tmp_path):
    """1x8, 2x4 and 4x2 micro-batches with dropout on: its masks belong to the micro-batch, not to the rank."""
    model = {"dropout": dropout, "attention_dropout": dropout}
    config = tiny(
        tmp_path,
        "exact",
        data,
        batch={"sequences": 16, "micro": 2},
        loss={"reduction": reduction},
        optimizer={"clip": 0.0},
        model=model,
    )
    reference, loss, samples, norm = measured(config, 1)
    total = np.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in reference.values()))
    assert norm == pytest.approx(total, rel=1e-5) and total > 0.1
    for world in (2, 4):
        gradients, other_loss, other_samples, other_norm = measured(config, world)
        assert (
            other_samples == samples
            and other_loss == pytest.approx(loss, rel=1e-6)
            and other_norm == pytest.approx(norm, rel=1e-6)
        )
        assert max(np.abs(gradients[name] - reference[name]).max() for name in reference) < 1e-6


@pytest.mark.parametrize("zero, micro", [(0, 8), (1, 4), (2, 2), (3, 1)])
def test_micro_batch_size_and_zero_stage(zero, micro, data, tmp_path):
    """Without dropout the micro-batch size does not matter either: two ranks against one with the whole batch."""
    model = {"dropout": 0.0, "attention_dropout": 0.0}
    sections = {"optimizer": {"clip": 0.0}, "model": model}
    reference, loss, samples, _ = measured(
        tiny(tmp_path, "whole", data, batch={"sequences": 16, "micro": 16}, **sections), 1
    )
    config = tiny(tmp_path, "split", data, batch={"sequences": 16, "micro": micro}, parallel={"zero": zero}, **sections)
    gradients, other_loss, other_samples, _ = measured(config, 2)
    assert other_samples == samples and other_loss == pytest.approx(loss, rel=1e-6)
    assert max(np.abs(gradients[name] - reference[name]).max() for name in reference) < 1e-6


def first_step_all_partitioned(process, settings):
    """`first_step` at ZeRO 3 with no parameter small enough to be kept whole on every rank."""
    from exlm_dist.training.engine import base as engines

    plain = engines.deepspeed_config

    def all_partitioned(*arguments):
        result = plain(*arguments)
        result["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return result

    engines.deepspeed_config = all_partitioned
    return first_step(process, settings)


def test_zero_3_with_every_parameter_partitioned(data, tmp_path):
    sections = {"optimizer": {"clip": 0.0}, "batch": {"sequences": 8, "micro": 2}}
    reference, loss, _, _ = measured(tiny(tmp_path, "plain", data, parallel={"zero": 1}, **sections), 2)
    config = tiny(tmp_path, "parted", data, parallel={"zero": 3, "activation_checkpointing": True}, **sections)
    gradients, other_loss, _, _ = on_ranks(first_step_all_partitioned, 2, config.model_dump())[0]
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert max(np.abs(gradients[name] - reference[name]).max() for name in reference) < 1e-6
