from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from packed import make_batch

from exlm_dist.config.schema import ModelConfig
from exlm_dist.model.build import build_model
from exlm_dist.model.objective import joint_log_probs, loss_sum, masked_scores, prior_paths, single_log_probs
from exlm_dist.model.stream import Stream

VOCABULARY = 13


def make_model(**changes):
    settings = {
        "layers": 1,
        "width": 16,
        "heads": 2,
        "ffn": 16,
        "states": 2,
        "max_positions": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "init_std": 0.4,
    }
    config = ModelConfig(**{**settings, **changes})
    return config, build_model(config, VOCABULARY, seed=2).eval()


def make_stream(config, lengths=(4, 5), **changes):
    batch = make_batch(
        list(lengths), states=config.states, anchors=config.anchors, vocab_size=VOCABULARY, ratio=0.4, **changes
    )
    return Stream.from_batch(batch), torch.from_numpy(batch.is_masked)


def enumerated_prior(transitions: torch.Tensor, targets: int, ends: int) -> torch.Tensor:
    """q [targets, states] by walking every path."""
    states = len(transitions)
    prior = torch.zeros(targets, states, dtype=torch.float64)
    for path in itertools.combinations(range(states), targets):
        if path[0] >= ends or path[-1] < states - ends:
            continue
        weight = math.exp(sum(float(transitions[a, b]) for a, b in zip(path, path[1:])))
        for i, u in enumerate(path):
            prior[i, u] += weight
    return prior / prior[0].sum()


def token_probabilities(model, stream) -> torch.Tensor:
    """p_u(w) of every state, [S, V]."""
    for layer in model.layers[:-1]:
        stream = layer(stream)
    features = model.output.norm(F.gelu(model.output.dense(stream.hidden)))
    return (features @ model.output.weight.T + model.output.bias).softmax(-1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"states": 3, "transitions": "sparse"},
        {"states": 3, "transitions": "uniform"},
        {"anchors": False, "states": 3},
        {"jump_prior": "gaussian"},
    ],
    ids=str,
)
@torch.no_grad()
def test_metric_by_walking_every_path(changes):
    config, model = make_model(**changes)
    stream, is_masked = make_stream(config, bucket=4)
    result = model(stream.replace(predict=True))
    scores = masked_scores(result, is_masked)
    prior = prior_paths(result)[0]
    states = token_probabilities(model, stream)
    nll, correct, count = 0.0, 0, 0
    for b in range(stream.num_sequences):
        n, size = int(stream.num_targets[b]), int(stream.num_states[b])
        ends = 1 if config.anchors else config.states
        expected = enumerated_prior(result.transitions[b, :size, :size], n, ends)
        assert torch.allclose(prior[b, :n, :size].double(), expected, atol=1e-6)
        first = int(stream.cu_states[b])
        distribution = expected @ states[first : first + size].double()
        assert torch.allclose(distribution.sum(-1), torch.ones(n, dtype=torch.float64), atol=1e-6)
        assert torch.equal(result.predictions[b, :n], distribution.argmax(-1))
        for i in range(n):
            index = int(stream.cu_targets[b]) + i
            if is_masked[index]:
                target = int(stream.target_ids[index])
                nll -= math.log(distribution[i, target])
                correct += int(distribution[i].argmax()) == target
                count += 1
    assert count == int(is_masked.sum()) > 0
    assert scores.tolist() == [pytest.approx(nll, rel=1e-5), correct, count]


@torch.no_grad()
def test_metric_of_the_plain_model_is_its_softmax():
    config, model = make_model(objective="mlm", states=1, anchors=False)
    stream, is_masked = make_stream(config, (6, 9, 7))
    scores = masked_scores(model(stream.replace(predict=True)), is_masked)
    states = token_probabilities(model, stream)
    chosen = states.gather(1, stream.target_ids[:, None])
    nll, correct, count = scores.tolist()
    assert nll == pytest.approx(-float(chosen.log().sum()), rel=1e-5)
    assert correct == int((states.argmax(-1) == stream.target_ids).sum()) and count == len(stream.target_ids)


def enumerated_joint(transitions: torch.Tensor | None, states: torch.Tensor, chosen: list[bool], ends: int):
    """P of every spelling of the masked targets, [V] * masks, by walking every path; states [L, V]: p_u(w)."""
    count, words = states.shape
    weights = {}
    for path in itertools.combinations(range(count), len(chosen)):
        if transitions is None or (path[0] < ends and path[-1] >= count - ends):
            steps = () if transitions is None else (float(transitions[a, b]) for a, b in itertools.pairwise(path))
            weights[path] = math.exp(sum(steps))
    joint = torch.zeros([words] * sum(chosen), dtype=torch.float64)
    for path, weight in weights.items():
        term = torch.tensor(weight, dtype=torch.float64)
        for state in itertools.compress(path, chosen):
            term = term[..., None] * states[state].double()
        joint += term
    return joint / sum(weights.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"states": 3, "transitions": "sparse"},
        {"states": 3, "transitions": "uniform"},
        {"anchors": False, "states": 3},
        {"objective": "mlm", "states": 1, "anchors": False},
    ],
    ids=str,
)
@torch.no_grad()
def test_joint_probability_of_every_spelling_by_walking_every_path(changes):
    config, model = make_model(**changes)
    stream, is_masked = make_stream(config, (5,), bucket=4)
    count = int(stream.num_targets[0])
    chosen = is_masked[:count].tolist()
    assert sum(chosen) == 2
    result = model(stream)
    states = token_probabilities(model, stream)[: int(stream.num_states[0])]
    ends = 1 if config.anchors else config.states
    edges = None if result.transitions is None else result.transitions[0]
    truth = enumerated_joint(edges, states, chosen, ends)
    assert float(truth.sum()) == pytest.approx(1, rel=1e-6)
    masks = result.by_target(is_masked, False)
    for spelling in itertools.product(range(VOCABULARY), repeat=2):
        targets = stream.target_ids.clone()
        targets[is_masked] = torch.tensor(spelling)
        result = model(stream.replace(target_ids=targets, predict=True))
        assert math.exp(float(joint_log_probs(result, masks))) == pytest.approx(float(truth[spelling]), rel=1e-4)
        single = single_log_probs(result)[masks]
        marginals = [truth.sum(1)[spelling[0]], truth.sum(0)[spelling[1]]]
        assert single.exp().tolist() == pytest.approx([float(one) for one in marginals], rel=1e-4)


@torch.no_grad()
def test_with_one_state_per_target_the_joint_is_the_product():
    config, model = make_model(states=1)
    stream, is_masked = make_stream(config, (6, 9))
    result = model(stream.replace(predict=True))
    masks = result.by_target(is_masked, False)
    product = torch.where(masks, single_log_probs(result), 0.0).sum(1)
    assert torch.allclose(joint_log_probs(result, masks), product, rtol=1e-5)


@torch.no_grad()
def test_metric_does_not_look_at_the_targets():
    config, model = make_model(states=3)
    stream, _ = make_stream(config)
    first = model(stream.replace(predict=True))
    shuffled = stream.replace(target_ids=stream.target_ids.roll(1))
    second = model(shuffled.replace(predict=True))
    assert torch.equal(first.predictions, second.predictions)
    assert torch.equal(first.prior, second.prior)


@torch.no_grad()
def test_predictions_do_not_depend_on_the_chunk(monkeypatch):
    config, model = make_model()
    stream, _ = make_stream(config, (4, 9, 6, 5))
    whole = model(stream.replace(predict=True)).predictions
    monkeypatch.setattr("exlm_dist.model.heads._PREDICTION_LOGITS", 1)
    assert torch.equal(whole, model(stream.replace(predict=True)).predictions)


@torch.no_grad()
def test_anchors_are_not_scored():
    config, model = make_model()
    stream, is_masked = make_stream(config)
    result = model(stream.replace(predict=True))
    assert masked_scores(result, torch.zeros_like(is_masked)).tolist() == [0, 0, 0]


def stream_with(log_likelihood: list[float], targets: list[int]) -> Stream:
    config, _ = make_model()
    stream, _ = make_stream(config, [4] * len(targets))
    starts = torch.tensor([0, *itertools.accumulate(targets)])
    return stream.replace(log_likelihood=torch.tensor(log_likelihood, requires_grad=True), cu_targets=starts)


def test_loss_is_normalised_by_sequence_or_left_to_the_caller():
    stream = stream_with([-6.0, -10.0], [3, 4])
    assert loss_sum(stream, "sequence")[0].item() == pytest.approx(6 / 3 + 10 / 4)
    assert loss_sum(stream, "token")[0].item() == pytest.approx(16.0)


@pytest.mark.parametrize("bad", [float("-inf"), float("nan")])
def test_a_sequence_without_a_likelihood_is_named_and_gives_no_gradient(bad):
    stream = stream_with([-6.0, bad, -4.0], [3, 4, 2])
    loss, invalid = loss_sum(stream, "sequence")
    assert invalid.tolist() == [False, True, False]
    loss.backward()
    assert loss.item() == pytest.approx(6 / 3 + 4 / 2)
    assert stream.log_likelihood.grad[1] == 0 and (stream.log_likelihood.grad[[0, 2]] < 0).all()


def marginals_by_matrices(transitions: torch.Tensor, targets: int) -> torch.Tensor:
    """The prior marginals [N, L] of a graph with one end, by a product of a vector and a matrix for each target."""
    matrix, ways = transitions.double().exp(), torch.zeros(2, targets, len(transitions), dtype=torch.float64)
    ways[0, 0, 0] = ways[1, -1, -1] = 1
    for i in range(1, targets):
        ways[0, i] = ways[0, i - 1] @ matrix
        ways[1, -1 - i] = matrix @ ways[1, -i]
        ways /= ways.sum(-1, keepdim=True).where(ways.sum(-1, keepdim=True) > 0, 1)
    joint = ways.prod(0)
    return joint / joint.sum(-1, keepdim=True)


@pytest.mark.parametrize("states", [2, 4, 8])
@pytest.mark.parametrize("masked", [18, 198])
@torch.no_grad()
def test_paths_of_a_new_model_are_where_their_targets_are(states, masked):
    """By the prior over groups every target is rather in its own group of states; without one hardly any is."""
    own_group = {}
    for prior in ("none", "group"):
        config, model = make_model(states=states, init_std=0.02, max_positions=2048, jump_prior=prior)
        batch = make_batch([2 * masked], states=states, vocab_size=VOCABULARY, ratio=0.5)
        stream = Stream.from_batch(batch)
        for layer in model.layers[:-1]:
            stream = layer(stream)
        marginals = marginals_by_matrices(model.output.distributions(stream)[1][0], masked + 2)
        if masked == 18:
            expected = prior_paths(model.output(stream))[0][0]
            torch.testing.assert_close(marginals.float(), expected, rtol=1e-3, atol=1e-6)
        own_group[prior] = marginals.unflatten(1, (masked + 2, states)).sum(-1).diagonal()
    assert own_group["group"].min() >= 0.5
    assert own_group["none"].median() < 0.1
