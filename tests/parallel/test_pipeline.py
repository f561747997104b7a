"""Sharded equals unsharded, through the real engine on real processes: losses, gradients, weights, evaluation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from integration.training_runs import tiny
from made_run import make_data
from parallel.harness import on_ranks

from exlm_dist.config import RunConfig

STEPS = 10
SECTIONS = {
    "batch": {"sequences": 8, "micro": 2},
    "schedule": {"steps": STEPS, "warmup": 2},
    # A large eps: otherwise a step is nearly the sign of the gradient, also where that is rounding alone.
    "optimizer": {"lr": 1e-2, "clip": 0.5, "eps": 1e-2},
}
#: Numbers are compared relative to the largest of their parameter, or to this: the bias of a key cancels in a softmax, so
#: that its gradient, and what it becomes, is rounding alone.
SMALLEST = 1e-3


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "prepared")


def trajectory(process, settings):
    """Losses, norms and scores of ten steps, gradients of the first, the weights and the evaluation after the last."""
    from exlm_dist.data.loader import Loader, eval_batches
    from exlm_dist.data.shards import ShardDataset
    from exlm_dist.parallel.grid import Grid
    from exlm_dist.parallel.layout import Layout
    from exlm_dist.training.engine import build_engine
    from exlm_dist.training.step import optimizer_step

    config = RunConfig.model_validate(settings)
    layout = Layout.of(config.parallel, process.world)
    process = dataclasses.replace(process, grid=Grid.make(layout, process.rank))
    datasets = {split: ShardDataset.open(config.data.path, split) for split in ("train", "valid")}
    packing = {
        "masking": config.masking, "states": config.model.states, "anchors": config.model.anchors,
        "micro": config.batch.micro, "max_positions": config.model.max_positions, "bucket": config.data.bucket,
        "vocab_size": datasets["train"].vocab_size,
        "rank": process.grid.data.rank, "world": process.grid.data.size,
    }  # fmt: skip
    loader = Loader(
        datasets["train"], seed=config.seed, global_batch=config.batch.sequences, prefetch=0, **packing
    )
    engine = build_engine(config, process, packing["vocab_size"], 20.0)
    initial = pieces(engine, None)
    rows, first = [], None
    for number in range(STEPS):
        result = optimizer_step(engine, loader.step(number), config, scored=True)
        scores = [0.0] * 3 if result.scores is None else result.scores.tolist()
        left_out = sum(float(mask.sum()) for _, mask in result.invalid)
        sums = process.gather([float(result.loss), left_out, *scores]).sum(0).tolist()
        rows.append([*sums, float(result.grad_norm)])
        if number == 0:
            first = pieces(engine, "exp_avg")
    sums = engine.evaluate(eval_batches(datasets["valid"], sequences=10, **packing))
    evaluation = process.gather([sums.nll, sums.correct, sums.count]).sum(0).tolist()
    after = optimizer_step(engine, loader.step(STEPS), config, scored=False)
    rows.append([float(process.gather([float(after.loss)]).sum())])
    final = pieces(engine, None)
    engine.close()
    return {"rows": rows, "initial": initial, "first": first, "final": final, "evaluation": evaluation}


def pieces(engine, key):
    """{name: (full shape, dim, start, stop, values)} of what this rank holds: the weights, or the moment `key`."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    for held in engine.parameters:
        if engine.zero == 0:
            value = held.parameter if key is None else engine.inner_optimizer.state[held.parameter][key]
        elif key is None:
            value = safe_get_full_fp32_param(held.parameter)
        else:
            value = safe_get_full_optimizer_state(held.parameter, key)
        place = (0, 0, held.shape[0]) if held.slice is None else (held.slice.dim, held.slice.start, held.slice.stop)
        # float32 numpy: what travels from the ranks to the test.
        found[held.name] = (held.shape, *place, value.detach().float().numpy().reshape(_local_shape(held)).copy())
    return found


def _local_shape(held):
    """Shape of the local tensor (ZeRO 3 has emptied it), padding of a vocabulary included."""
    shape = list(held.part_shape)
    if held.slice is not None:
        shape[held.slice.dim] = -1
    return shape


def assembled(ranks, what):
    """{name: full array} from the pieces of all ranks; copies of a piece must be equal to the last bit."""
    full, filled = {}, {}
    for rank in ranks:
        for name, (shape, dim, start, stop, values) in rank[what].items():
            target = full.setdefault(name, np.zeros(shape, np.float32))
            seen = filled.setdefault(name, np.zeros(shape, bool))
            index = (slice(None),) * dim + (slice(start, stop),)
            part = values[(slice(None),) * dim + (slice(0, stop - start),)]
            if seen[index].all():
                assert np.array_equal(target[index], part), f"{what} {name}: copies differ"
            target[index], seen[index] = part, True
    assert all(seen.all() for seen in filled.values())
    return full


def measured(config, world):
    """(rows of numbers per step, initial weights, first gradients, final weights, evaluation), whole and unsharded."""
    ranks = on_ranks(trajectory, world, config.model_dump(), timeout=120.0)
    for rank in ranks[1:]:
        assert rank["rows"] == ranks[0]["rows"] and rank["evaluation"] == ranks[0]["evaluation"]
    return ranks[0]["rows"], *(assembled(ranks, what) for what in ("initial", "first", "final")), ranks[0]["evaluation"]


def deviations(got, wanted):
    """Of each parameter: largest deviation relative to its largest number, or to SMALLEST where that is larger."""
    assert got.keys() == wanted.keys()
    return {name: np.abs(got[name] - wanted[name]).max() / max(np.abs(wanted[name]).max(), SMALLEST) for name in wanted}


def compare(got, wanted, *, copies=1, bound=1e-5):
    """Everything that `measured` gives; `copies`: data-parallel degree."""
    rows, initial, first, final, evaluation = got
    for mine, theirs in zip(rows, wanted[0], strict=True):
        if copies > 1:  # scores are those of the last micro-batch of each copy
            mine, theirs = [*mine[:2], *mine[5:]], [*theirs[:2], *theirs[5:]]
        assert mine == pytest.approx(theirs, rel=bound, abs=1e-7)
    for name, value in wanted[1].items():
        assert np.array_equal(initial[name], value), f"{name} starts differently"
    for name, deviation in deviations(first, wanted[2]).items():
        assert deviation < bound, f"first gradient of {name}: {deviation}"
    for name, deviation in deviations(final, wanted[3]).items():
        assert deviation < bound, f"{name} after {STEPS} steps: {deviation}"
    assert evaluation == pytest.approx(wanted[4], rel=bound)


MODELS = {
    "dense": {"model": {"dropout": 0.0, "attention_dropout": 0.0}},
    "dropout": {"model": {"dropout": 0.1, "attention_dropout": 0.1}},
    "sparse": {"model": {"dropout": 0.0, "attention_dropout": 0.0, "transitions": "sparse"}},
    "untied": {"model": {"dropout": 0.1, "attention_dropout": 0.1, "tie_head": False, "layers": 3, "norm": "post"}},
    "mlm": {
        "model": {"dropout": 0.0, "attention_dropout": 0.0, "objective": "mlm", "states": 1, "anchors": False}
    },
}


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    """`measured` of the unsharded run of each model, once."""
    found = {}

    def of(name):
        if name not in found:
            config = tiny(tmp_path_factory.mktemp("one"), "one", data, **SECTIONS, **MODELS[name])
            found[name] = measured(config, 1)
        return found[name]

    return of


CASES = [
    ("dropout", {"pipeline": 2}, 2),
    ("sparse", {"pipeline": 2, "activation_checkpointing": True}, 2),
    ("mlm", {"pipeline": 2, "offload": True}, 2),
    ("untied", {"pipeline": 3}, 3),
    ("dropout", {"pipeline": 2, "data": 2}, 4),
    ("dropout", {"tensor": 2, "pipeline": 2}, 4),
    ("sparse", {"tensor": 2, "pipeline": 2, "sequence": True}, 4),
    ("dropout", {"tensor": 2, "data": 2, "zero": 2}, 4),
    ("dense", {"tensor": 2, "zero": 0}, 2),
    ("mlm", {"tensor": 2, "zero": 1}, 2),
    ("dropout", {"tensor": 2, "zero": 3, "data": 2}, 4),
]


@pytest.mark.parametrize("model, parallel, world", CASES, ids=lambda value: str(value))
def test_sharded_equals_unsharded(model, parallel, world, reference, data, tmp_path):
    config = tiny(tmp_path, "sharded", data, parallel=parallel, **SECTIONS, **MODELS[model])
    copies = world // (config.parallel.tensor * config.parallel.pipeline)
    compare(measured(config, world), reference(model), copies=copies)
