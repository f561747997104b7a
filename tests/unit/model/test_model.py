from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from allocations import Allocations
from packed import make_batch

from exlm_dist.config.schema import ModelConfig
from exlm_dist.model.build import build_model
from exlm_dist.model.feedforward import FeedForward, GeluLinear
from exlm_dist.model.objective import loss_sum
from exlm_dist.model.stream import Stream

VOCABULARY = 23
LENGTHS = [9, 14, 6, 11]


def small(**changes) -> ModelConfig:
    settings = {
        "layers": 2,
        "width": 16,
        "heads": 2,
        "ffn": 24,
        "states": 3,
        "max_positions": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "init_std": 0.3,
    }
    return ModelConfig(**{**settings, **changes})


PLAIN = {"objective": "mlm", "states": 1, "anchors": False}
SWITCHES = [
    {"transitions": kind, "anchors": anchors, "states": states}
    for kind, anchors, states in itertools.product(("dense", "sparse", "uniform"), (True, False), (1, 3))
] + [
    {"jump_prior": "group"},
    {"jump_prior": "gaussian", "transitions": "sparse"},
    {"norm": "post"},
    {"rotary": "1d"},
    {"transition_positions": False},
    {"tie_head": False},
    {"states": 16},
    PLAIN,
    {**PLAIN, "norm": "post", "rotary": "1d"},
]


def batch_for(config: ModelConfig, lengths=LENGTHS, **changes):
    return make_batch(lengths, states=config.states, anchors=config.anchors, vocab_size=VOCABULARY, **changes)


def run(config: ModelConfig, batch, *, train=False, dropout_seed=0, select=True, **options):
    """(stream out, loss, gradients by name) in fp64."""
    model = build_model(config, VOCABULARY, seed=1, **options).double().train(train)
    result = model(Stream.from_batch(batch, dropout_seed=dropout_seed).replace(select=select))
    loss, invalid = loss_sum(result, "sequence")
    assert not invalid.any()
    loss.backward()
    return result, loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_equal(first, second, tolerance=1e-12):
    assert torch.allclose(first[1], second[1], rtol=tolerance, atol=0)
    assert first[2].keys() == second[2].keys()
    for name, gradient in first[2].items():
        assert torch.allclose(gradient, second[2][name], rtol=1e-9, atol=tolerance), name


@pytest.mark.parametrize("changes", SWITCHES, ids=str)
def test_every_switch_trains_every_parameter(changes):
    config = small(**changes, max_positions=512)
    _, loss, gradients = run(config, batch_for(config))
    assert torch.isfinite(loss) and loss > 0
    # One state per target leaves a single path of sparse transitions, so that these have nothing to learn.
    silent = ("transition",) if config.transitions == "sparse" and config.states == 1 else ("key.bias",)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0 or any(part in name for part in silent), name


def test_canonical_names():
    names = {name for name, _ in build_model(small(layers=1), VOCABULARY, seed=0).named_parameters()}
    parts = [
        "blocks.0.attention_norm",
        "blocks.0.attention.qkv",
        "blocks.0.attention.out",
        "blocks.0.ffn_norm",
        "blocks.0.ffn.up",
        "blocks.0.ffn.down",
        "norm",
        "output.dense",
        "output.norm",
        "output.transition.query",
        "output.transition.key",
        "output.transition.gate",
    ]
    expected = {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert names == expected | {"embedding.weight", "output.bias", "output.transition.positions.weight"}
    untied = {name for name, _ in build_model(small(layers=1, tie_head=False), VOCABULARY, seed=0).named_parameters()}
    assert untied - names == {"output.weight"}


def test_initial_values_depend_on_seed_and_name_alone():
    shallow, deep = (dict(build_model(small(layers=n), VOCABULARY, seed=4).named_parameters()) for n in (1, 3))
    assert all(torch.equal(value, deep[name]) for name, value in shallow.items())
    other = dict(build_model(small(layers=1), VOCABULARY, seed=5).named_parameters())
    assert not torch.equal(other["embedding.weight"], shallow["embedding.weight"])
    assert (shallow["norm.weight"] == 1).all() and (shallow["output.bias"] == 0).all()
    assert abs(deep["blocks.2.ffn.up.weight"].std() - 0.3) < 0.05


def test_a_model_is_allocated_once_in_the_type_it_computes_in():
    """One full fp32 tensor at a time is beside it; a model to be filled from a checkpoint takes no random number."""
    config = small(layers=4, width=64, heads=4, ffn=128)
    before = torch.get_rng_state()
    with Allocations() as allocations:
        model = build_model(config, VOCABULARY, seed=4, dtype=torch.bfloat16)
    sizes = [parameter.numel() for parameter in model.parameters()]
    # The peak has the meta device's 4 bytes, which take no memory; no second copy is beside them.
    assert allocations.live == 2 * sum(sizes) and allocations.peak <= (2 + 4) * sum(sizes)
    assert torch.equal(before, torch.get_rng_state())
    drawn = dict(build_model(config, VOCABULARY, seed=4).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, drawn[name].to(torch.bfloat16)), name
    assert model.output.weight is model.embedding.weight
    empty = dict(build_model(config, VOCABULARY, seed=None).named_parameters())
    assert {name for name, value in empty.items() if value.any()} == {name for name in drawn if "norm.weight" in name}


@pytest.mark.parametrize("changes", [{}, {"norm": "post"}, PLAIN], ids=str)
def test_going_on_with_the_states_only_changes_nothing(changes):
    config = small(**changes)
    batch = batch_for(config, bucket=8)
    assert_equal(run(config, batch), run(config, batch, select=False))


@pytest.mark.parametrize(
    "changes", [{}, {"transitions": "sparse"}, {"transitions": "uniform", "anchors": False}, PLAIN], ids=str
)
def test_bucket_padding_and_neighbours_change_nothing(changes):
    config = small(**changes)
    whole = run(config, batch_for(config))
    assert_equal(whole, run(config, batch_for(config, bucket=32)))
    alone, _, _ = run(config, batch_for(config, LENGTHS[:1]))
    assert torch.allclose(alone.log_likelihood, whole[0].log_likelihood[:1], rtol=1e-12)


def test_rows_up_to_a_multiple_change_nothing():
    config = small()
    stream = Stream.from_batch(batch_for(config))
    aligned = stream.aligned(7)
    assert len(stream.input_ids) % 7 and len(stream.state_index) % 7 and stream.aligned(1) is stream
    assert len(aligned.input_ids) % 7 == len(aligned.state_index) % 7 == 0
    model = build_model(config, VOCABULARY, seed=1).double()
    first, second = (model(each).log_likelihood for each in (stream, aligned))
    assert torch.allclose(first, second, rtol=1e-12)


def test_recomputed_activations_give_the_same_gradient_with_dropout():
    config = small(dropout=0.2, attention_dropout=0.2)
    batch = batch_for(config)
    kept = run(config, batch, train=True, dropout_seed=3)
    again = run(config, batch, train=True, dropout_seed=3, activation_checkpointing=True)
    assert torch.equal(kept[1], again[1])
    assert all(torch.equal(gradient, again[2][name]) for name, gradient in kept[2].items())
    assert not torch.equal(kept[1], run(config, batch, train=True, dropout_seed=4)[1])


def test_plain_model_is_cross_entropy_at_the_masked_positions():
    config = small(**PLAIN)
    batch = batch_for(config)
    model = build_model(config, VOCABULARY, seed=1).double()
    stream = Stream.from_batch(batch)
    result = model(stream)
    hidden = stream.replace(select=False)
    for layer in model.layers[:-1]:
        hidden = layer(hidden)
    features = model.output.norm(F.gelu(model.output.dense(hidden.hidden[stream.state_index])))
    losses = F.cross_entropy(
        features @ model.embedding.weight.T + model.output.bias, stream.target_ids, reduction="none"
    )
    expected = torch.stack([part.sum() for part in losses.split(stream.num_targets.tolist())])
    assert torch.allclose(-result.log_likelihood, expected, rtol=1e-12)
    assert result.transitions is None


def test_too_long_a_sequence_is_refused_with_the_numbers():
    config = small(max_positions=8)
    with pytest.raises(ValueError, match=r"exceeds the 8 rows.*model.max_positions"):
        run(config, batch_for(config))


def test_gelu_linear_is_linear_of_gelu(monkeypatch):
    monkeypatch.setattr("exlm_dist.model.feedforward._BLOCK_ELEMENTS", 40)
    layer = GeluLinear(6, 4).double()
    raw, inner = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((23, 6), (6,)))
    expected = F.linear(F.gelu(raw + inner), layer.weight, layer.bias)

    def passed(*_):
        return layer(raw + inner.detach(), inner)

    assert torch.allclose(passed(), expected)
    grad, leaves = torch.randn_like(expected), (raw, inner, layer.weight, layer.bias)
    for ours, other in zip(*(torch.autograd.grad(out, leaves, grad) for out in (passed(), expected))):
        assert torch.allclose(ours, other, rtol=1e-12)


def test_feed_forward_without_gradients_is_the_same():
    layer, hidden = FeedForward(6, 20), torch.randn(9, 6)
    with_gradients = layer(hidden)
    with torch.inference_mode():
        assert torch.allclose(layer(hidden), with_gradients, atol=1e-6)
    with torch.no_grad():
        exact = F.linear(F.gelu(F.linear(hidden, layer.up.weight, layer.up.bias)), layer.down.weight, layer.down.bias)
    assert with_gradients.requires_grad and torch.allclose(with_gradients, exact, atol=1e-6)


def test_token_dropout_only_acts_in_training():
    config = small()
    batch = batch_for(config)
    plain = run(config, batch)[1]
    assert torch.equal(plain, run(config, batch, token_dropout=4)[1])
    assert not torch.equal(plain, run(config, batch, token_dropout=4, train=True)[1])
