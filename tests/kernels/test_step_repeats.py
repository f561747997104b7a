"""A step on a GPU gives the same bits whenever it is computed: without that no run can be resumed exactly there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from packed import make_batch

from exlm_dist.config.schema import ModelConfig
from exlm_dist.kernels.determinism import compute_repeatably
from exlm_dist.model.build import build_model
from exlm_dist.model.objective import loss_sum
from exlm_dist.model.stream import Stream

VOCABULARY = 64
PLAIN = {"objective": "mlm", "states": 1, "anchors": False, "rotary": "1d", "transitions": "uniform"}


@pytest.fixture
def repeatably():
    compute_repeatably()
    yield
    torch.set_deterministic_debug_mode("default")
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.usefixtures("repeatably")
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "sparse", "plain"])
@pytest.mark.parametrize("sequences", [32, 256])  # torch sums rows differently below and above 3,072
def test_gradients_repeat_to_the_bit(kind: str, sequences: int) -> None:
    choice = PLAIN if kind == "plain" else {"transitions": kind}
    config = ModelConfig(layers=4, width=256, heads=8, ffn=1024, dropout=0.1, attention_dropout=0.1, **choice)
    model = build_model(config, VOCABULARY, seed=0).to("cuda", torch.bfloat16).train()
    lengths = np.random.default_rng(0).integers(20, 60, sequences).tolist()
    batch = make_batch(lengths, states=config.states, anchors=config.anchors, vocab_size=VOCABULARY, ratio=0.15)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss_sum(model(Stream.from_batch(batch, torch.device("cuda"), dropout_seed=1)), "sequence")[0].backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    first, kept = gradients(), []
    for attempt in range(8):
        kept.append(torch.empty(1_000_003 * (attempt + 1), device="cuda"))  # other addresses, other timing
        again = gradients()
        differing = [name for name in first if not torch.equal(first[name], again[name])]
        assert not differing, f"attempt {attempt}: {differing}"
