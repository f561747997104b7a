"""Where the layers are cut, and that the stages, one after the other, are the whole model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from packed import make_batch

from exlm_dist.config.schema import ModelConfig
from exlm_dist.model.build import build_model
from exlm_dist.model.stages import cut_layers, described, layer_costs
from exlm_dist.model.stream import Stream


def most_expensive(costs, stages):
    """Cost of the most expensive stage in the best of all cuts."""
    blocks = len(costs) - 3
    best = float("inf")
    for inner in itertools.combinations(range(1, blocks), stages - 1):
        edges = [0, *[end + 1 for end in inner], len(costs)]
        best = min(best, max(sum(costs[start:stop]) for start, stop in zip(edges, edges[1:])))
    return best


@pytest.mark.parametrize("seed", range(20))
def test_no_cut_is_better(seed):
    random = np.random.default_rng(seed)
    blocks = int(random.integers(2, 9))
    costs = [float(cost) for cost in random.integers(0, 6, blocks + 3)]
    for stages in range(1, blocks + 1):
        cut = cut_layers(costs, stages)
        assert [layer for layers in cut for layer in layers] == list(range(len(costs))) and len(cut) == stages
        assert all(any(1 <= layer <= blocks for layer in layers) for layers in cut)
        assert max(sum(costs[layer] for layer in layers) for layers in cut) == pytest.approx(
            most_expensive(costs, stages)
        )


def test_a_heavy_output_layer_takes_blocks_off_the_last_stage():
    assert cut_layers([0, 1, 1, 1, 1, 1, 1, 0, 2], 2) == [range(0, 5), range(5, 9)]
    assert cut_layers([0, 1, 1, 1, 1, 0, 0], 2) == [range(0, 3), range(3, 7)]
    assert cut_layers([0, 1, 1, 1, 0, 100], 3) == [range(0, 2), range(2, 3), range(3, 6)]


def test_a_cut_in_words():
    text = described([range(0, 3), range(3, 6)], [0, 1, 1, 1, 0, 2])
    assert text == "embedding to block 2 (40%); block 3 to output (60%)"


@pytest.mark.parametrize("stages", [0, 3])
def test_more_stages_than_blocks_are_refused(stages):
    with pytest.raises(ValueError, match="2 blocks cannot be cut"):
        cut_layers([0, 1, 1, 0, 0], stages)


def test_the_output_layer_of_the_base_model_weighs_about_two_blocks():
    costs = layer_costs(ModelConfig(), 32_000, 128, 0.15)
    assert len(costs) == 15 and costs[0] == costs[-2] == 0 and len(set(costs[1:13])) == 1
    assert 1.5 < costs[-1] / costs[1] < 3


@pytest.mark.parametrize("config", [{}, {"tie_head": False, "norm": "post"}], ids=str)
@pytest.mark.parametrize("stages", [2, 3])
def test_stages_one_after_the_other_are_the_whole_model(config, stages):
    """Each stage with its layers and its own stream, given the hidden states as between processes; with dropout, bit by
    bit."""
    settings = ModelConfig(layers=3, width=16, heads=2, ffn=24, states=3, max_positions=64, **config)
    whole = build_model(settings, 23, seed=3)
    stream = Stream.from_batch(make_batch([9, 14, 6], bucket=4), dropout_seed=2**62 + 1).replace(predict=True)
    expected, hidden = whole(stream), None
    names: list[str] = []
    for stage in cut_layers([0.0, 1.0, 1.0, 1.0, 0.0, 1.0], stages):
        model = build_model(settings, 23, seed=3, stage=stage)
        names += [parameter.name for parameter in model.sharded_parameters() if parameter.saved]
        result = model(stream.replace(hidden=hidden))
        hidden = result.hidden
        assert len(model.layers) == len(stage) and hidden.is_contiguous()
    assert sorted(names) == sorted(name for name, _ in whole.named_parameters())
    assert torch.equal(result.log_likelihood, expected.log_likelihood)
    assert torch.equal(result.predictions, expected.predictions)
