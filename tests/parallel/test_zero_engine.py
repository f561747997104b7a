"""What the engine without stages leaves to DeepSpeed: where parameters lie, and how an evaluation gets weights."""

from __future__ import annotations

import dataclasses

import pytest
from integration.training_runs import tiny
from made_run import make_data
from parallel.harness import on_ranks

from exlm_dist.config import RunConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "prepared")


def built(process, settings):
    """Engine, training micro-batches by step and held-out micro-batches of this rank."""
    from exlm_dist.data.loader import Loader, eval_batches
    from exlm_dist.data.order import Order
    from exlm_dist.data.recipe import Recipe
    from exlm_dist.data.shards import ShardDataset
    from exlm_dist.parallel.layout import Layout
    from exlm_dist.parallel.process_groups import Grid
    from exlm_dist.training.engine import build_engine

    config = RunConfig.model_validate(settings)
    process = dataclasses.replace(process, grid=Grid.make(Layout.of(config.parallel, process.world), process.rank))
    train, valid = (ShardDataset.open(config.data.path, split) for split in ("train", "valid"))
    replica = {"rank": process.grid.data.rank, "world": process.grid.data.size}
    recipe = Recipe.of(config, train.vocab_size)
    order = Order.of(config.data, config.seed, len(train))
    loader = Loader(train, recipe, order=order, global_batch=config.batch.sequences, prefetch=0, **replica)
    asked = Recipe.for_evaluation(config, train.vocab_size)
    engine = build_engine(config, process, train.vocab_size, 20.0)
    return config, engine, loader, list(eval_batches(valid, asked, sequences=10, **replica))


def evaluated_by_layers(process, settings):
    """Evaluations between steps at ZeRO 3 build no model, and change neither its result nor the run's."""
    import deepspeed
    import torch

    from exlm_dist.model.scoring import score
    from exlm_dist.training.engine import base
    from exlm_dist.training.step import optimizer_step

    config, engine, loader, held_out = built(process, settings)
    whole = base.build_local_model(config, process, engine.parameters[0].shape[0]).to(engine.dtype)

    def refuse(*arguments, **keywords):
        raise AssertionError("an evaluation built the model again")

    base.build_model = refuse
    losses = []
    for number in range(4):
        found = engine.evaluate(held_out)
        with torch.no_grad():
            for sharded, target in zip(engine.parameters, whole.parameters(), strict=True):
                with deepspeed.zero.GatheredParameters([sharded.parameter]):
                    target.copy_(sharded.parameter)
        assert found.vector() == score(whole, held_out, "cpu").vector()
        assert engine.deepspeed.module.training
        losses.append(float(optimizer_step(engine, loader.step(number), config, scored=True).result.loss))
    engine.close()
    return losses


def trained(process, settings):
    """The same losses without an evaluation."""
    from exlm_dist.training.step import optimizer_step

    config, engine, loader, _ = built(process, settings)
    losses = [
        float(optimizer_step(engine, loader.step(number), config, scored=True).result.loss) for number in range(4)
    ]
    engine.close()
    return losses


@pytest.mark.parametrize("dtype, world", [("fp32", 1), ("bf16", 2)])
def test_an_evaluation_at_zero_3_takes_the_weights_layer_by_layer(dtype, world, data, tmp_path):
    settings = tiny(tmp_path, "run", data, parallel={"zero": 3}, precision={"dtype": dtype}).model_dump()
    assert on_ranks(evaluated_by_layers, world, settings) == on_ranks(trained, world, settings)


def addresses(process, settings):
    """{name: (elements, address of the working copy modulo 16)} after a step."""
    from exlm_dist.training.step import optimizer_step

    config, engine, loader, _ = built(process, settings)
    optimizer_step(engine, loader.step(0), config, scored=False)
    found = {one.name: (one.parameter.numel(), one.parameter.data_ptr() % 16) for one in engine.parameters}
    engine.close()
    return found


@pytest.mark.parametrize("zero", [1, 2])
def test_no_parameter_of_an_even_size_is_off_its_alignment(zero, data, tmp_path):
    """Whatever the size of the vocabulary, and hence of `output.bias`."""
    settings = tiny(tmp_path, "run", data, parallel={"zero": zero}, precision={"dtype": "bf16"}).model_dump()
    (found,) = on_ranks(addresses, 1, settings)
    assert found["output.bias"][0] % 8, "the example must have a vocabulary that is no multiple of 8"
    assert [name for name, (size, off) in found.items() if off and size % 8 == 0] == []
    assert found["output.bias"][1] == 0
