"""Sums about the alignment, against walks over every path and loops over every state."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from packed import make_batch

from exlm_dist.config.schema import ModelConfig
from exlm_dist.model.alignment import AlignmentTotals, alignment_sums, effective_number
from exlm_dist.model.build import build_model
from exlm_dist.model.stream import Stream

VOCABULARY = 13
KINDS = {
    "dense": {"states": 3},
    "sparse": {"states": 3, "transitions": "sparse"},
    "no anchors": {"states": 2, "anchors": False},
    "one state": {"states": 1},
}


def run(changes: dict, lengths=(4, 5, 3)):
    """(settings, features and token distributions [S, ...] of the states, result, masked targets [B, N])"""
    sizes = {"layers": 1, "width": 16, "heads": 2, "ffn": 16, "max_positions": 64, "init_std": 0.4}
    config = ModelConfig(**sizes, dropout=0.0, attention_dropout=0.0, **changes)
    model = build_model(config, VOCABULARY, seed=2).eval()
    batch = make_batch(
        list(lengths), states=config.states, anchors=config.anchors, vocab_size=VOCABULARY, ratio=0.4, bucket=4
    )
    stream = Stream.from_batch(batch)
    with torch.no_grad():
        result = model(stream.replace(predict=True))
        inner = stream
        for layer in model.layers[:-1]:
            inner = layer(inner)
        head = model.output
        tokens = F.linear(head.norm(F.gelu(head.dense(inner.hidden))), head.weight, head.bias).softmax(-1)
    return config, inner.hidden, tokens, result, result.by_target(torch.from_numpy(batch.is_masked), False)


def walked(edges: torch.Tensor, match: torch.Tensor, ends: int) -> torch.Tensor:
    """Posterior [N, L] by walking every path; match 0: the prior."""
    targets, states = match.shape
    found = torch.zeros(targets, states, dtype=torch.float64)
    for path in itertools.combinations(range(states), targets):
        if path[0] < ends and path[-1] >= states - ends:
            steps = sum(float(edges[a, b]) for a, b in itertools.pairwise(path))
            weight = math.exp(steps + sum(float(match[i, u]) for i, u in enumerate(path)))
            for i, u in enumerate(path):
                found[i, u] += weight
    return found / found[0].sum()


def entropy(weights: torch.Tensor) -> float:
    return -sum(float(one) * math.log(float(one)) for one in weights if one > 0)


def square(difference: torch.Tensor) -> float:
    return float(difference.double().square().sum())


@pytest.mark.parametrize("kind", KINDS)
def test_sums_by_walking_every_path(kind):
    config, features, tokens, result, masks = run(KINDS[kind])
    k, ends = config.states, 1 if config.anchors else config.states
    expected = dict.fromkeys(AlignmentTotals.__dataclass_fields__, 0.0)
    clones = [0.0] * k
    for b, first in enumerate(result.cu_states[:-1].tolist()):
        n, size = int(result.num_targets[b]), int(result.num_states[b])
        edges, match = result.transitions[b, :size, :size], result.match[b, :n, :size]
        prior, posterior = walked(edges, torch.zeros_like(match), ends), walked(edges, match, ends)
        masked = masks[b, :n].nonzero()[:, 0].tolist()
        group = {i: slice(first + i * k, first + (i + 1) * k) for i in masked}
        centres = {i: features[group[i]].mean(0) for i in masked}
        middle = torch.stack(list(centres.values())).mean(0)
        for i in masked:
            own = slice(i * k, (i + 1) * k)
            expected["tokens"] += 1
            expected["prior_entropy"] += entropy(prior[i])
            expected["posterior_entropy"] += entropy(posterior[i])
            expected["prior_own"] += float(prior[i, own].sum())
            expected["posterior_own"] += float(posterior[i, own].sum())
            spread = [(one - tokens[group[i]].mean(0)).abs().sum() / 2 for one in tokens[group[i]]]
            expected["token_spread"] += float(sum(spread)) / k
            if len(masked) > 1:
                expected["within"] += sum(square(one - centres[i]) for one in features[group[i]]) / k
                expected["between"] += square(centres[i] - middle)
            clones = [known + float(more) for known, more in zip(clones, posterior[i, own])]
    totals = AlignmentTotals.of(alignment_sums(result, masks).tolist())
    assert totals.clones == pytest.approx(clones, rel=1e-4, abs=1e-6)
    for name in set(expected) - {"clones"}:
        assert getattr(totals, name) == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    assert totals.tokens >= 5 and (totals.within > 0) == (totals.token_spread > 1e-3) == (k > 1)


def test_means_of_sums():
    totals = AlignmentTotals.of([4, 8, 2, 3, 3.6, 5, 10, 1, 1.8, 1.8, 0, 0])
    assert totals.clones == (1.8, 1.8, 0, 0) and AlignmentTotals.size(4) == 12
    assert totals.means() == {
        "alignment_prior_entropy": 2,
        "alignment_posterior_entropy": 0.5,
        "alignment_prior_own": 0.75,
        "alignment_posterior_own": 0.9,
        "alignment_token_spread": 0.25,
        "alignment_states_used": pytest.approx(2),
        "alignment_hidden_spread": 0.5,
    }


def test_effective_number():
    assert effective_number((3.0,)) == effective_number((0.0, 2.0, 0.0)) == 1
    assert effective_number((0.1,) * 4) == pytest.approx(4)
    assert 1 < effective_number((0.9, 0.1)) < 2 and math.isnan(effective_number((0.0, 0.0)))


def test_the_plain_model_has_no_alignment():
    config, _, _, result, masks = run({"objective": "mlm", "states": 1, "anchors": False})
    sums = alignment_sums(result, masks).tolist()
    assert sums == [0] * AlignmentTotals.size(config.states) and AlignmentTotals.of(sums).means() == {}


def test_a_sequence_without_a_likelihood_is_left_out():
    _, _, _, result, masks = run(KINDS["dense"])
    whole = AlignmentTotals.of(alignment_sums(result, masks).tolist())
    broken = result.log_likelihood.clone()
    broken[0] = math.nan
    match = result.match.clone()
    match[0] = math.nan
    rest = AlignmentTotals.of(alignment_sums(result.replace(log_likelihood=broken, match=match), masks).tolist())
    assert rest.tokens == whole.tokens - int(masks[0].sum())
    assert all(math.isfinite(one) for one in rest.means().values())
