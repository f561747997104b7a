"""A model split over 2 and 4 gloo ranks computes what the whole one does: loss, every gradient, ten steps.

Each configuration runs on real processes, which compare with a whole model of their own; what they give back is small.
"""

from __future__ import annotations

import functools
import subprocess
import sys

import numpy as np
import pytest
from harness import on_ranks
from packed import make_batch

LENGTHS = [9, 14, 6, 11]
VOCABULARY = 26  # 13 words for each of two ranks; four hold 7, 7, 7 and 5
STEPS = 10


def settings(**changes):
    from exlm_dist.config.schema import ModelConfig

    chosen = {
        "layers": 2,
        "width": 32,
        "heads": 4,
        "ffn": 24,
        "states": 3,
        "max_positions": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "init_std": 0.3,
    }
    return ModelConfig(**{**chosen, **changes})


def streams(config, count: int):
    from exlm_dist.model.stream import Stream

    for step in range(count):
        lengths = LENGTHS[step % 4 :] + LENGTHS[: step % 4]
        batch = make_batch(
            lengths, states=config.states, anchors=config.anchors, vocab_size=VOCABULARY, seed=step
        )
        yield batch, Stream.from_batch(batch, dropout_seed=step)


def loss_of(model, stream):
    from exlm_dist.model.objective import loss_sum

    loss, invalid = loss_sum(model(stream), "sequence")
    assert not invalid.any()
    return loss / stream.num_sequences


def part_of(full, held):
    """What `held` holds of the tensor `full`."""
    return full if held.slice is None else full.narrow(held.slice.dim, held.slice.start, held.part_shape[held.slice.dim])


def difference(ours, expected) -> float:
    """Largest difference as a share of the largest value."""
    return float((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def compare(process, changes, sequence):
    """Build whole and split; compare initial values, loss, gradients and `STEPS` steps of AdamW."""
    import torch

    from exlm_dist.model.build import build_model
    from exlm_dist.parallel.held import held_by
    from exlm_dist.parallel.tensor import split

    config = settings(**changes)
    group = torch.distributed.group.WORLD
    build = functools.partial(build_model, config, VOCABULARY, seed=3)
    whole, own = build(), build(split=functools.partial(split, group=group, sequence=sequence))
    full, parts = dict(whole.named_parameters()), held_by(own)
    assert [held.name for held in parts] == list(full)
    for held in parts:
        assert held.shape == tuple(full[held.name].shape)
        assert torch.equal(held.parameter[tuple(map(slice, held.part_shape))], part_of(full[held.name], held)), held.name
    optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01) for model in (whole, own)]
    found = {"loss": [], "gradient": {}, "weights": {}}
    for step, (_, stream) in enumerate(streams(config, STEPS)):
        losses = [loss_of(model, stream) for model in (whole, own)]
        for loss, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            loss.backward()
        if step == 0:
            for held in parts:
                used = tuple(map(slice, held.part_shape))
                expected = part_of(full[held.name].grad, held)
                scale = full[held.name].grad.abs().max().clamp(min=1e-30)
                if "key.bias" not in held.name:  # its gradient is 0 but for rounding
                    found["gradient"][held.name] = float((held.parameter.grad[used] - expected).abs().max() / scale)
        for optimizer in optimizers:
            optimizer.step()
        found["loss"].append(difference(*(loss.detach() for loss in losses[::-1])))
    return found


CASES = {
    "TP2": (2, {}, False),
    "TP2 sequence": (2, {}, True),
    "TP4": (4, {"transitions": "sparse"}, False),
    "TP4 sequence": (4, {}, True),
    "TP2 mlm": (2, {"objective": "mlm", "states": 1, "anchors": False}, False),
    "TP2 sequence dropout": (2, {"dropout": 0.2, "attention_dropout": 0.2}, True),
}


@pytest.mark.parametrize(("world", "changes", "sequence"), CASES.values(), ids=CASES)
def test_split_equals_whole(world, changes, sequence):
    for found in on_ranks(compare, world, changes, sequence):
        print(found)
        assert max(found["loss"]) < 1e-5, found["loss"]
        for name, value in found["gradient"].items():
            assert value < 1e-5, (name, value)
