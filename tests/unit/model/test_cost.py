from __future__ import annotations

import subprocess
import sys

import pytest

from exlm_dist.config.schema import ModelConfig
from exlm_dist.model.cost import Sizes, count_parameters, flops_per_sequence

PLAIN = ModelConfig(objective="mlm", states=1, anchors=False)
BASE = ModelConfig()
VOCABULARY = 50_265


def total(model: ModelConfig, length: int, masked: int) -> float:
    return sum(flops_per_sequence(model, VOCABULARY, Sizes.of(model, length, masked)).values()) / 1e9


@pytest.mark.parametrize("length,masked,plain,exlm", [(128, 19, 71.5, 122.3), (512, 76, 307.8, 519.7)])
def test_flops_of_base(length, masked, plain, exlm):
    """The table that was worked out by hand from the architecture (forward and backward, GF per sequence)."""
    assert total(PLAIN, length, masked) == pytest.approx(plain, abs=0.1)
    assert total(BASE, length, masked) == pytest.approx(exlm, abs=0.1)


def test_parts_of_base_at_128():
    parts = {name: value / 1e9 for name, value in flops_per_sequence(BASE, VOCABULARY, Sizes.of(BASE, 128, 19)).items()}
    assert parts == pytest.approx({"linear": 97.3, "attention": 4.0, "token head": 19.8, "transitions": 1.2}, abs=0.06)


@pytest.mark.parametrize("states,ratio", [(2, 1.24), (4, 1.71), (8, 2.66)])
def test_cost_of_states(states, ratio):
    assert total(ModelConfig(states=states), 128, 19) / total(PLAIN, 128, 19) == pytest.approx(ratio, abs=0.006)


def test_sizes_with_and_without_anchors():
    assert Sizes.of(BASE, 128, 19) == Sizes(128, 21, 191, 84)
    assert Sizes.of(ModelConfig(anchors=False), 128, 19) == Sizes(128, 19, 185, 76)
    assert Sizes.of(PLAIN, 128, 19) == Sizes(128, 19, 128, 19)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_head": False},
        {"transition_positions": False},
        {"transitions": "uniform"},
        {"transitions": "sparse"},
        {"objective": "mlm", "states": 1, "anchors": False},
    ],
    ids=str,
)
def test_parameters_are_those_of_the_model(changes):
    from exlm_dist.model.build import build_model

    config = ModelConfig(layers=3, width=24, heads=2, ffn=40, max_positions=50, **changes)
    model = build_model(config, 31, seed=0)
    assert sum(count_parameters(config, 31).values()) == sum(p.numel() for p in model.parameters())


def test_needs_no_torch():
    code = "import sys; import exlm_dist.model.cost; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
