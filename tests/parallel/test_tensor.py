"""A model sharded over 2 and 4 gloo ranks computes what the whole one does: loss, every gradient, ten steps.

All cases of a degree run in one set of processes, each of which compares its shard with a whole model of its own and
returns what it found. In fp32 rounding of the two orders of summation is all that may differ; in fp64 nothing that
matters.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packed import make_batch
from parallel.harness import on_ranks

LENGTHS = [9, 14, 6, 11]
VOCABULARY = 26  # 13 rows for each of two ranks; four have 7, 7, 7 and 5
STEPS = {"fp32": 10, "fp64": 3}
BOUNDS = {"fp32": 1e-5, "fp64": 1e-10}
MLM = {"objective": "mlm", "states": 1, "anchors": False}
DROPOUT = {"dropout": 0.2, "attention_dropout": 0.2}
RECOMPUTED = {"token_dropout": 4, "activation_checkpointing": True}
#: degree, changes of the model, sequence parallelism, options of build_model
CASES = {
    "TP2": (2, {}, False, {}),
    "TP2 sequence": (2, {}, True, {}),
    "TP2 sequence sparse post-norm": (2, {"transitions": "sparse", "norm": "post"}, True, {}),
    "TP2 mlm": (2, MLM, False, {}),
    "TP2 mlm sequence": (2, MLM, True, {}),
    "TP2 untied uniform": (2, {"tie_head": False, "transitions": "uniform"}, False, {}),
    "TP2 dropout": (2, DROPOUT, False, {"token_dropout": 4}),
    "TP2 sequence dropout recomputed": (2, DROPOUT, True, RECOMPUTED),
    "TP4, jump prior": (4, {"transition_positions": False, "jump_prior": "group"}, False, {}),
    "TP4 sparse, jump prior": (4, {"transitions": "sparse", "jump_prior": "laplace"}, False, {}),
    "TP4 sequence": (4, {"layers": 1}, True, {}),
    "TP4 sequence dropout": (4, DROPOUT, True, {}),
}


def settings(**changes):
    from exlm_dist.config.schema import ModelConfig

    chosen = {
        "layers": 2,
        "width": 32,
        "heads": 4,
        "ffn": 24,
        "states": 3,
        "jump_prior": "none",
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
        shape = {"states": config.states, "anchors": config.anchors, "vocab_size": VOCABULARY}
        yield Stream.from_batch(make_batch(lengths, **shape, seed=step), dropout_seed=step)


def loss_of(model, stream):
    from exlm_dist.model.objective import loss_sum

    loss, invalid = loss_sum(model(stream), "sequence")
    assert not invalid.any()
    return loss / stream.num_sequences


class Pair:
    """A whole model and this rank's shard of it. Differences are relative to the largest element of the whole."""

    def __init__(self, config, group, sequence, options, precision):
        import torch

        from exlm_dist.model.build import build_model
        from exlm_dist.parallel.sharded import sharded_parameters
        from exlm_dist.parallel.tensor import apply_tensor_parallel

        dtype = {"fp32": torch.float32, "fp64": torch.float64}[precision]
        build = functools.partial(build_model, config, VOCABULARY, seed=3, **options)
        shard = functools.partial(apply_tensor_parallel, group=group, sequence=sequence)
        self.models = [build(), build(shard=shard)]
        self.models = [model.to(dtype) for model in self.models]
        self.full, self.parts = dict(self.models[0].named_parameters()), sharded_parameters(self.models[1])
        shapes = [(name, tuple(parameter.shape)) for name, parameter in self.full.items()]
        assert [(sharded.name, sharded.shape) for sharded in self.parts] == shapes
        self.optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6) for model in self.models]
        self.group = group

    def backward(self, stream) -> float:
        """Run both and give the difference of their losses; `traffic`: what the sharded one has sent."""
        from exlm_dist.parallel.traffic import Traffic

        losses = []
        for model, optimizer in zip(self.models, self.optimizers):
            optimizer.zero_grad()
            with Traffic() as self.traffic:
                losses.append(loss_of(model, stream))
                losses[-1].backward()
        return abs(float(losses[1].detach() / losses[0].detach()) - 1)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def weights(self) -> dict[str, float]:
        return {sharded.name: self._difference(sharded, lambda parameter: parameter.detach()) for sharded in self.parts}

    def gradients(self) -> dict[str, float]:
        # That of the keys' bias is 0 but for rounding: it shifts all scores of a row alike.
        parts = [sharded for sharded in self.parts if "key.bias" not in sharded.name]
        return {sharded.name: self._difference(sharded, lambda parameter: parameter.grad) for sharded in parts}

    def _difference(self, sharded, value) -> float:
        expected, own = value(self.full[sharded.name]), value(sharded.parameter)[used(sharded)]
        part = sharded.slice
        same = expected if part is None else expected.narrow(part.dim, part.start, part.stop - part.start)
        return float((own - same).abs().max() / expected.abs().max().clamp(min=1e-30))

    def norm(self) -> float:
        """That of the global gradient: sharded parameters are summed over the ranks, replicated ones count once."""
        import torch

        marked = [getattr(part.parameter, "tensor_model_parallel", False) for part in self.parts]
        assert marked == [part.slice is not None for part in self.parts]
        squares = [part.parameter.grad.double().square().sum() for part in self.parts]
        sharded = sum(square for square, is_sharded in zip(squares, marked) if is_sharded)
        torch.distributed.all_reduce(sharded, group=self.group)
        total = sharded + sum(square for square, is_sharded in zip(squares, marked) if not is_sharded)
        return abs(float(total.sqrt() / torch.nn.utils.get_total_norm([p.grad for p in self.full.values()])) - 1)


def used(sharded) -> tuple[slice, ...]:
    """Where in the local tensor its part of the full one lies; the rest is padding."""
    return tuple(map(slice, sharded.part_shape))


def compare(group, changes, sequence, options):
    config = settings(**changes)
    found = {}
    for precision, steps in STEPS.items():
        pair = Pair(config, group, sequence, options, precision)
        seen = found[precision] = {"initial": pair.weights(), "loss": [], "gradients": [], "norm": []}
        if precision == "fp32":
            found["predictions"] = [predictions(model, next(streams(config, 1))) for model in pair.models]
        for step, stream in enumerate(streams(config, steps)):
            seen["loss"].append(pair.backward(stream))
            if step == 0 or precision == "fp64":
                seen["gradients"].append(pair.gradients())
                seen["norm"].append(pair.norm())
            if step == 0 and precision == "fp32":
                found["sent"] = {kind: (calls, pair.traffic.bytes[kind]) for kind, calls in pair.traffic.calls.items()}
                found["expected"] = expected_traffic(config, stream, group.size() if sequence else 0)
            pair.step()
    found["slices"] = {
        sharded.name: sharded.slice and (sharded.slice.start, sharded.slice.stop) for sharded in pair.parts
    }
    found["saved"] = {sharded.name: sharded.saved for sharded in pair.parts}
    found["replicas"] = {
        sharded.name: sharded.parameter.detach().numpy() for sharded in pair.parts if sharded.slice is None
    }
    found["padding"] = [padding(sharded) for sharded in pair.parts]
    return found


def compare_all(process, names):
    import torch

    return {name: compare(torch.distributed.group.WORLD, *CASES[name][1:]) for name in names}


def predictions(model, stream):
    """The most probable token of every target, without dropout, three of the four sequences at a time (of four ranks
    one has fewer vocabulary rows than the others, and must not take more sequences). The last block sees all tokens."""
    from exlm_dist.model import heads

    heads._PREDICTION_LOGITS = 3 * stream.max_states * len(model.output.bias)
    found = model.eval()(stream.replace(predict=True, select=False)).predictions
    model.train()
    return [row[:count].tolist() for row, count in zip(found, stream.num_targets)]


def expected_traffic(config, stream, multiple):
    """The table of docs/parallelism.md: calls and bytes by kind; `multiple`: of rows (0: no sequence parallelism)."""
    stream = stream.aligned(multiple or 1)
    width, blocks = config.width, config.layers - 1
    token, state = (4 * width * len(rows) for rows in (stream.input_ids, stream.state_index))
    states, targets, longest = len(stream.state_index), stream.max_targets, stream.max_states
    sums = [state, 4 * states, 4 * states, 4 * states * targets]
    if config.objective == "exlm" and config.transitions != "uniform":
        row = 4 * stream.num_sequences * longest
        sums += [state, row * longest, row * longest, row, row]
        sums += [4 * width * stream.max_tokens] if config.transition_positions else []
    if not multiple:
        sums += [token] + [token] * 4 * blocks + [token, state, state, state]
        return {"all_reduce": (len(sums), sum(sums))}
    sums += [4 * width] * (6 * config.layers + 2)
    gathers = [token] + [token] * 6 * blocks + [token] * 3 + [state] * 4 + [state]
    scatters = [token] + [token] * 4 * blocks + [token] * 2 + [state] * 3
    kinds = {"all_reduce": sums, "all_gather": gathers, "reduce_scatter": scatters}
    return {kind: (len(sizes), sum(sizes)) for kind, sizes in kinds.items()}


def padding(sharded) -> float:
    """Largest element of the padding of the local tensor."""
    local = sharded.parameter.detach().clone()
    local[used(sharded)] = 0
    return float(local.abs().max())


@pytest.fixture(scope="module")
def results():
    """What each rank found, by case."""
    found = {}
    for world in (2, 4):
        names = [name for name, case in CASES.items() if case[0] == world]
        ranks = on_ranks(compare_all, world, names, timeout=120)
        found |= {name: [rank[name] for rank in ranks] for name in names}
    return found


@pytest.mark.parametrize("precision", STEPS)
@pytest.mark.parametrize("name", CASES)
def test_sharded_equals_whole(results, name, precision):
    for found in (rank[precision] for rank in results[name]):
        assert len(found["loss"]) == STEPS[precision] and max(found["loss"]) < BOUNDS[precision], found["loss"]
        assert max(found["norm"]) < BOUNDS[precision], found["norm"]
        for gradients in found["gradients"]:
            assert max(gradients.values()) < BOUNDS[precision], gradients
        assert all(value == 0 for value in found["initial"].values()), found["initial"]


@pytest.mark.parametrize("name", CASES)
def test_predictions_are_those_of_the_whole(results, name):
    for whole, own in (found["predictions"] for found in results[name]):
        assert own == whole and len({token for row in own for token in row}) > 1


@pytest.mark.parametrize("name", [name for name in CASES if "recomputed" not in name])
def test_what_is_sent_is_what_the_documentation_says(results, name):
    for found in results[name]:
        assert found["sent"] == found["expected"]


@pytest.mark.parametrize("name", CASES)
def test_parts_make_the_whole_and_replicas_stay_equal(results, name):
    ranks = results[name]
    for parameter, part in ranks[0]["slices"].items():
        parts = [found["slices"][parameter] for found in ranks]
        saved = [found["saved"][parameter] for found in ranks]
        if part is None:
            first, *others = (found["replicas"][parameter] for found in ranks)
            assert all(np.array_equal(first, other) for other in others), parameter
            assert parts == [None] * len(ranks) and saved == [True] + [False] * len(others)
        else:
            assert parts[0][0] == 0 and all(before[1] == after[0] for before, after in zip(parts, parts[1:]))
            assert all(saved)
    assert ranks[-1]["slices"]["embedding.weight"][1] == VOCABULARY
    assert all(value == 0 for found in ranks for value in found["padding"])


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
