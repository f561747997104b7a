"""A model split over 2 and 4 gloo ranks computes what the whole one does: loss, every gradient, ten steps.

All cases of a degree run in one set of processes, each of which compares its part with a whole model of its own and
gives back what it found.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

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
        yield Stream.from_batch(batch, dropout_seed=step)


def loss_of(model, stream):
    from exlm_dist.model.objective import loss_sum

    loss, invalid = loss_sum(model(stream), "sequence")
    assert not invalid.any()
    return loss / stream.num_sequences


def compare(group, changes, sequence, options):
    """Build whole and split; compare initial values, losses, gradients, norm and weights over `STEPS` steps of AdamW."""
    import torch

    from exlm_dist.model.build import build_model
    from exlm_dist.parallel.held import held_by
    from exlm_dist.parallel.tensor import split
    from exlm_dist.parallel.traffic import Traffic

    config = settings(**changes)
    build = functools.partial(build_model, config, VOCABULARY, seed=3, **options)
    whole, own = build(), build(split=functools.partial(split, group=group, sequence=sequence))
    full, parts = dict(whole.named_parameters()), held_by(own)
    assert [(held.name, held.shape) for held in parts] == [(name, tuple(p.shape)) for name, p in full.items()]
    found = {"initial": {held.name: part_difference(full, held) for held in parts}, "loss": [], "norm": []}
    found["predictions"] = [predictions(model, next(streams(config, 1))) for model in (whole, own)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01) for model in (whole, own)]
    for step, stream in enumerate(streams(config, STEPS)):
        losses = []
        for model, optimizer in zip((whole, own), optimizers):
            optimizer.zero_grad()
            with Traffic() as traffic:
                losses.append(loss_of(model, stream))
                losses[-1].backward()
        found["loss"].append(abs(float(losses[1] / losses[0]) - 1))
        expected = torch.nn.utils.get_total_norm([p.grad for p in full.values()])
        found["norm"].append(abs(float(total_norm(parts, group) / expected) - 1))
        if step == 0:
            found["sent"] = {kind: (calls, traffic.bytes[kind]) for kind, calls in traffic.calls.items()}
            found["expected"] = expected_traffic(config, stream, group.size() if sequence else 0)
            found["gradient"] = {held.name: part_difference(full, held, gradient=True) for held in parts}
        for optimizer in optimizers:
            optimizer.step()
    found["weights"] = {held.name: part_difference(full, held) for held in parts}
    found["slices"] = {held.name: held.slice and (held.slice.dim, held.slice.start, held.slice.stop) for held in parts}
    found["saved"] = {held.name: held.saved for held in parts}
    found["replicas"] = {held.name: held.parameter.detach().numpy() for held in parts if held.slice is None}
    found["filling"] = [filling(held) for held in parts]
    return found


def predictions(model, stream):
    """The most probable token of every target, without dropout."""
    found = model.eval()(stream.replace(predict=True)).predictions
    model.train()
    return [row[:count].tolist() for row, count in zip(found, stream.num_targets)]


def expected_traffic(config, stream, multiple):
    """The table of docs/parallelism.md: calls and bytes by kind; `multiple`: of rows, 0 without sequence parallelism."""
    stream = stream.aligned(multiple or 1)
    width, blocks = config.width, config.layers - 1
    token, state = (4 * width * len(rows) for rows in (stream.input_ids, stream.state_index))
    states, targets, longest = len(stream.state_index), stream.max_targets, stream.max_states
    sums = [state, 4 * states, 4 * states, 4 * states * targets]
    if config.objective == "exlm" and config.transitions != "uniform":
        moves = 4 * stream.num_sequences * longest
        sums += [state, moves * longest, moves * longest, moves, moves]
        sums += [4 * width * stream.max_tokens] if config.transition_positions else []
    if not multiple:
        sums += [token] + [token] * 4 * blocks + [token, state, state, state]
        return {"all_reduce": (len(sums), sum(sums))}
    sums += [4 * width] * (6 * config.layers + 2)
    gathers = [token] + [token] * 6 * blocks + [token] * 3 + [state] * 4 + [state]
    scatters = [token] + [token] * 4 * blocks + [token] * 2 + [state] * 3
    kinds = {"all_reduce": sums, "all_gather": gathers, "reduce_scatter": scatters}
    return {kind: (len(sizes), sum(sizes)) for kind, sizes in kinds.items()}


def used(held, gradient=False):
    """The part of the full parameter (or of its gradient) that lies in the local one, without what fills it up."""
    local = held.parameter.grad if gradient else held.parameter.detach()
    return local[tuple(map(slice, held.part_shape))]


def filling(held) -> float:
    """Largest number in what fills the local tensor up."""
    local = held.parameter.detach().clone()
    local[tuple(map(slice, held.part_shape))] = 0
    return float(local.abs().max())


def part_difference(full, held, gradient=False):
    """Largest difference from the whole model's, as a share of its largest number."""
    expected = full[held.name].grad if gradient else full[held.name].detach()
    part = held.slice
    own = expected if part is None else expected.narrow(part.dim, part.start, part.stop - part.start)
    return float((used(held, gradient) - own).abs().max() / expected.abs().max().clamp(min=1e-30))


def total_norm(parts, group):
    """Norm of the global gradient: what is cut is summed over the ranks, what all hold counts once."""
    import torch

    cut = [held.parameter.grad for held in parts if getattr(held.parameter, "tensor_model_parallel", False)]
    assert len(cut) == sum(held.slice is not None for held in parts)
    square = sum(gradient.double().square().sum() for gradient in cut)
    torch.distributed.all_reduce(square, group=group)
    return (square + sum(held.parameter.grad.double().square().sum() for held in parts if held.slice is None)).sqrt()


def compare_all(process, names):
    import torch

    return {name: compare(torch.distributed.group.WORLD, *CASES[name][1:]) for name in names}


MLM = {"objective": "mlm", "states": 1, "anchors": False}
#: degree, changes of the model, sequence parallelism, options of build_model
CASES = {
    "TP2": (2, {}, False, {}),
    "TP2 sequence": (2, {}, True, {}),
    "TP2 sparse post-norm": (2, {"transitions": "sparse", "norm": "post"}, True, {}),
    "TP2 mlm": (2, MLM, False, {}),
    "TP2 mlm sequence": (2, MLM, True, {}),
    "TP2 untied uniform": (2, {"tie_head": False, "transitions": "uniform"}, False, {}),
    "TP2 dropout": (2, {"dropout": 0.2, "attention_dropout": 0.2}, False, {"token_dropout": 4}),
    "TP2 sequence dropout recomputed": (
        2, {"dropout": 0.2, "attention_dropout": 0.2}, True, {"token_dropout": 4, "activation_checkpointing": True}
    ),
    "TP4": (4, {"transition_positions": False}, False, {}),
    "TP4 sparse": (4, {"transitions": "sparse"}, False, {}),
    "TP4 sequence": (4, {"layers": 1}, True, {}),
    "TP4 sequence dropout": (4, {"dropout": 0.2, "attention_dropout": 0.2}, True, {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def results():
    """What each rank found, by case."""
    found = {}
    for world in (2, 4):
        names = [name for name, case in CASES.items() if case[0] == world]
        ranks = on_ranks(compare_all, world, names, timeout=120)
        found |= {name: [rank[name] for rank in ranks] for name in names}
    return found


@pytest.mark.parametrize("name", CASES)
def test_split_equals_whole(results, name):
    for found in results[name]:
        assert max(found["loss"]) < 1e-5 and max(found["norm"]) < 1e-5, found
        assert found["gradient"].keys() == found["initial"].keys()
        for parameter, value in found["gradient"].items():
            # The gradient of the keys' bias is 0 but for rounding: a shift of all scores of a row.
            assert value < 1e-5 or "key.bias" in parameter, (parameter, value)
        assert len(found["loss"]) == STEPS
        whole, own = found["predictions"]
        assert own == whole and len({token for row in own for token in row}) > 1


@pytest.mark.parametrize("name", [name for name in CASES if "recomputed" not in name])
def test_what_is_sent_is_what_the_documentation_says(results, name):
    for found in results[name]:
        assert found["sent"] == found["expected"]


@pytest.mark.parametrize("name", CASES)
def test_initial_values_are_those_of_the_whole(results, name):
    assert all(value == 0 for found in results[name] for value in found["initial"].values())


@pytest.mark.parametrize("name", CASES)
def test_parts_make_the_whole_and_replicas_stay_equal(results, name):
    ranks = results[name]
    for parameter, part in ranks[0]["slices"].items():
        parts = [found["slices"][parameter] for found in ranks]
        assert [found["saved"][parameter] for found in ranks] == [place == 0 or part is not None for place in range(len(ranks))]
        if part is None:
            first, *others = (found["replicas"][parameter] for found in ranks)
            assert all(np.array_equal(first, other) for other in others), parameter
        else:
            assert parts[0][1] == 0 and all(before[2] == after[1] for before, after in zip(parts, parts[1:]))
    assert ranks[-1]["slices"]["embedding.weight"][2] == VOCABULARY
    assert all(value == 0 for found in ranks for value in found["filling"])


def test_one_rank_alone_needs_no_megatron():
    """Also where it is not installed."""
    code = (
        "import sys; sys.modules['megatron'] = None\n"
        "from test_tensor import VOCABULARY, loss_of, settings, streams\n"
        "from exlm_dist.model.build import build_model\n"
        "config = settings()\n"
        "loss_of(build_model(config, VOCABULARY, seed=0), next(streams(config, 1))).backward()\n"
        "import exlm_dist.training.session\n"
        "assert not any(name.startswith('megatron.') for name in sys.modules)\n"
    )
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), str(here.parents[1])])
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env={**os.environ, "PYTHONPATH": path})
