"""Completions: every path and every completion of small graphs by enumeration, and what the command says of them."""

from __future__ import annotations

import copy
import csv
import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from made_run import make_config, make_data, make_run
from scipy.stats import chisquare

import exlm_dist
from exlm_dist.cli import main
from exlm_dist.data.expansion import expand, wrap
from exlm_dist.data.masking import Masks
from exlm_dist.data.packing import pack
from exlm_dist.inference.completions import StateChain
from exlm_dist.inference.fill import FillSettings, fill_text, fill_texts, state_chains
from exlm_dist.inference.loading import load_checkpoint
from exlm_dist.kernels.dag import dag_log_likelihood
from exlm_dist.model.objective import prior_paths
from exlm_dist.model.stream import Stream
from exlm_dist.tokenizers.masked_text import encode_masked
from exlm_dist.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from exlm_dist.tokenizers.smiles_tokenizer import SmilesTokenizer
from exlm_dist.tokenizers.tokenizer import MASK, NUM_SPECIAL
from exlm_dist.utils.errors import ConfigError, DataError

VOCABULARY = NUM_SPECIAL + 3


def random_chain(seed: int, kind: str):
    """(first arguments of StateChain) of a small graph: 3 or 4 targets with k = 3 states each, or the plain model."""
    random = np.random.default_rng(seed)
    masked = np.array({"anchors": [False, True, True, False]}.get(kind, [True, True, True]))
    states = len(masked) * (1 if kind == "plain" else 3)
    log_tokens = torch.tensor(2 * random.normal(size=(states, VOCABULARY))).log_softmax(1).numpy()
    if kind == "plain":
        return log_tokens, None, masked, 1
    scores = np.where(np.triu(np.ones((states, states)), 1) > 0, 2 * random.normal(size=(states, states)), -np.inf)
    edges = torch.tensor(scores).log_softmax(1).nan_to_num(-np.inf, neginf=-np.inf).numpy()
    return log_tokens, edges, masked, 1 if kind == "anchors" else 2


def enumerated(log_tokens, edges, masked, ends) -> dict[tuple[int, ...], float]:
    """P of every completion: over all paths, the prior of the path times what its states emit."""
    states, targets = len(log_tokens), len(masked)
    emit = np.exp(log_tokens[:, NUM_SPECIAL:])
    emit /= emit.sum(1, keepdims=True)
    paths = {}
    for path in itertools.combinations(range(states), targets):
        if edges is None:
            paths[path] = 1.0
        elif path[0] < ends and path[-1] >= states - ends:
            paths[path] = np.exp(sum(edges[v, u] for v, u in itertools.pairwise(path)))
    mass = sum(paths.values())
    found = {}
    for tokens in itertools.product(range(VOCABULARY - NUM_SPECIAL), repeat=int(masked.sum())):
        total = 0.0
        for path, weight in paths.items():
            at_masks = [state for state, is_masked in zip(path, masked) if is_masked]
            total += weight * np.prod([emit[state, token] for state, token in zip(at_masks, tokens)])
        found[tuple(token + NUM_SPECIAL for token in tokens)] = total / mass
    return found


@pytest.mark.parametrize("kind", ["anchors", "no anchors", "plain"])
@pytest.mark.parametrize("seed", range(3))
def test_best_completions_and_marginals_are_those_of_all_paths(kind, seed):
    arguments = random_chain(seed, kind)
    chain, truth = StateChain(*arguments, NUM_SPECIAL), enumerated(*arguments)
    assert sum(truth.values()) == pytest.approx(1)
    ranked = sorted(truth, key=lambda tokens: -truth[tokens])
    best = chain.best(len(truth), beam=1)
    assert [one.tokens for one in best] == ranked
    for one in best:
        assert np.exp(one.log_probability) == pytest.approx(truth[one.tokens])
        assert chain.log_probability(one.tokens) == pytest.approx(one.log_probability)
    assert [one.tokens for one in chain.best(2, beam=9)] == ranked[:2]
    marginals = chain.marginals()
    assert not marginals[:, :NUM_SPECIAL].any()
    for i, row in enumerate(marginals):
        for token in range(NUM_SPECIAL, VOCABULARY):
            assert row[token] == pytest.approx(sum(p for tokens, p in truth.items() if tokens[i] == token))


def test_samples_have_the_joint_distribution():
    arguments = random_chain(5, "anchors")
    chain, truth = StateChain(*arguments, NUM_SPECIAL), enumerated(*arguments)
    drawn = chain.sample(4000, 1.0, np.random.default_rng(0))
    counts = {tokens: 0 for tokens in truth}
    for one in drawn:
        counts[one.tokens] += 1
        assert np.exp(one.log_probability) == pytest.approx(truth[one.tokens])
    expected = np.array(list(truth.values())) * len(drawn)
    assert chisquare(list(counts.values()), expected).pvalue > 1e-3
    coldest = {one.tokens for one in chain.sample(50, 1e-3, np.random.default_rng(0))}
    greedy = chain.best(1, beam=1)  # of one prefix at a time
    assert coldest == {greedy[0].tokens}


def test_scores_far_apart_neither_overflow_nor_vanish():
    """Dense transitions may put all weight on jumps that a path of N targets cannot take."""
    log_tokens, edges, masked, _ = random_chain(1, "anchors")
    edges = edges * 400
    chain = StateChain(log_tokens, edges, masked, 1, NUM_SPECIAL)
    best = chain.best(50, beam=50)
    assert sum(np.exp(one.log_probability) for one in best) == pytest.approx(1)
    np.testing.assert_allclose(chain.marginals().sum(1), 1)


@pytest.fixture(scope="module", params=["exlm", "mlm"], ids=str)
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return load_checkpoint(make_run(make_config(folder, "run", make_data(folder / "data"), request.param)))


def forward(loaded, ids, tokens):
    """(result of the model's own forward pass, which targets are masked, logits [S, V]) of `ids`, whose masks hide
    `tokens`."""
    at, settings, row = np.flatnonzero(ids == MASK), loaded.config.model, np.zeros(1, np.int64)
    whole = ids.copy()
    whole[at] = tokens
    masks = Masks(at, np.array([len(at)]), np.full(len(at), MASK))
    expanded = expand(wrap(whole, np.array([len(ids)]), masks, settings.anchors), settings.states)
    batch = pack(expanded, 0, 1, states=settings.states, bucket=1, sample_ids=row, epochs=row, step=0, index=0)
    features = []
    hook = loaded.model.output.norm.register_forward_hook(lambda *call: features.append(call[2]))
    with torch.no_grad():
        stream = loaded.model(Stream.from_batch(batch))
        logits = features[0] @ loaded.model.output.weight.T + loaded.model.output.bias
    hook.remove()
    return stream, torch.from_numpy(batch.is_masked), logits


def test_marginals_are_the_distribution_of_the_metric(loaded):
    """docs/metric.md, by the model's own forward pass, but for the special tokens."""
    ids = np.array(encode_masked(loaded.tokenizer, "CC(=O)<mask>c1cc<mask>cc1C"))
    stream, is_masked, logits = forward(loaded, ids, NUM_SPECIAL)
    logits[:, :NUM_SPECIAL] = -torch.inf
    expected = (prior_paths(stream)[0][0] @ logits.softmax(-1))[is_masked]
    (chain,) = state_chains(loaded, [ids])
    np.testing.assert_allclose(chain.marginals(), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("loaded", ["exlm"], indirect=True)
def test_the_joint_probability_is_the_likelihood_of_training(loaded):
    """log P(completion) = log P(targets) - log of the prior mass of all paths of so many targets, by the kernel that
    training uses, on what the model gives it (less the special tokens); with weights so rough that states differ."""
    rough = dataclasses.replace(loaded, model=copy.deepcopy(loaded.model))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in rough.model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
    ids = np.array(encode_masked(loaded.tokenizer, "CC(<mask>)<mask>c1cc<mask>cc1C"))
    (chain,) = state_chains(rough, [ids])
    marginals, gains = chain.marginals(), []
    for one in chain.best(3, beam=20):
        stream, is_masked, logits = forward(rough, ids, one.tokens)
        ordinary = logits.log_softmax(-1)[:, NUM_SPECIAL:].logsumexp(-1)
        match = torch.where(is_masked[:, None], stream.match - ordinary, 0.0)
        likelihood, prior = (
            dag_log_likelihood(m, stream.transitions, stream.num_targets, stream.num_states, ends=stream.ends)
            for m in (match, torch.zeros_like(match))
        )
        assert one.log_probability == pytest.approx(float(likelihood - prior), abs=1e-4)
        gains.append(one.log_probability - np.log(marginals[range(3), list(one.tokens)]).sum())
    assert max(map(abs, gains)) > 1e-2  # else no path would matter


def test_texts_in_one_call_are_filled_as_each_alone(loaded, monkeypatch):
    texts = ["CC<mask>", "no mask", "c1cc<mask>c<mask>c1", None, "C[Xx]<mask>", "[C<mask>]", "C" * 260 + "<mask>"]
    results = fill_texts(loaded, texts)
    assert [isinstance(result, str) for result in results] == [False, True, False, True, True, True, True]
    assert results[1] == "no mask in it: write <mask> or [MASK] for each token to fill"
    assert results[3] == "empty" and "lacks '[Xx]'" in results[4]
    assert "'[C' does not consist of SMILES tokens" in results[5] and "but the model takes 256" in results[6]
    for index in (0, 2):
        alone = fill_text(loaded, texts[index])
        assert [one.text for one in alone.completions] == [one.text for one in results[index].completions]
        for one, other in zip(alone.completions, results[index].completions):
            assert one.probability == pytest.approx(other.probability, rel=1e-4)
            assert (one.canonical is not None) == one.valid
            assert one.text == texts[index].replace("<mask>", "{}").format(*one.tokens)
    monkeypatch.setattr("exlm_dist.inference.fill.BATCH_TOKENS", {"cpu": 1})
    for one, other in zip(results, fill_texts(loaded, texts)):
        assert isinstance(one, str) or one.completions[0].text == other.completions[0].text


@pytest.mark.parametrize("loaded", ["mlm"], indirect=True)
def test_the_plain_model_is_independent(loaded):
    filled = fill_text(loaded, "c1cc<mask>c<mask>c1")
    first, second = ({name: p for name, p in row} for row in filled.marginals)
    assert filled.completions[0] == filled.independent
    for one in filled.completions[:2]:
        assert one.probability == pytest.approx(first[one.tokens[0]] * second[one.tokens[1]])


def test_masks_in_text():
    words = ["the cat sat on the mat", "a dog ran to the unbelievable house", "cats and dogs run"] * 20
    tokenizer = SentencePieceTokenizer.train(words, 288)
    names = tokenizer.tokens()

    def shown(text: str) -> list[str]:
        return [names[i] for i in encode_masked(tokenizer, text)]

    for left, right in (("the cat ", " on the mat"), ("", " cat"), ("a dog", "")):
        expected = [names[i] for i in tokenizer.encode(left.strip())] + ["<mask>"]
        assert shown(f"{left}[MASK]{right}") == expected + [names[i] for i in tokenizer.encode(right.strip())]
    assert shown("the <mask><mask> ran").count("<mask>") == 2
    glued = shown("dog<mask>able")
    assert glued[glued.index("<mask>") + 1] != "\u2581able" and "".join(glued).replace("\u2581", "") == "dog<mask>able"
    with pytest.raises(DataError, match="private character"):
        encode_masked(tokenizer, "\ue5ff <mask>")


def test_the_command(loaded, tmp_path, capsys):
    checkpoint = ["--checkpoint", str(loaded.folder), "--device", "cpu"]
    assert main(["fill", "CC(=O)<mask>c1ccccc1", *checkpoint, "--top", "3", "--marginal"]) == 0
    out = capsys.readouterr().out
    assert out.count("CC(=O)") >= 4 and "probability" in out and "mask 1" in out and "independent" in out
    assert main(["fill", "CCO", *checkpoint]) == 77
    assert "error: 'CCO': no mask in it: write <mask> or [MASK]" in capsys.readouterr().err
    assert main(["fill", "C<mask>", *checkpoint, "--sample", "2", "--temperature", "0"]) == 2
    assert "temperature = 0.0: must be above 0." in capsys.readouterr().err
    source, table = tmp_path / "m.csv", tmp_path / "out.csv"
    source.write_text("id,smiles\na,CC<mask>\nb,CC\nc,c1cc<mask>ccc1\n")
    assert main(["fill", "--input", str(source), "--out", str(table), *checkpoint, "--top", "2"]) == 0
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["rank"]) for row in rows] == [("a", "1"), ("a", "2"), ("b", "1"), ("c", "1"), ("c", "2")]
    assert rows[2]["completion"] == rows[2]["probability"] == "" and float(rows[0]["probability"]) > 0
    assert float(rows[0]["log_probability"]) == pytest.approx(np.log(float(rows[0]["probability"])))
    assert "no mask in it" in (tmp_path / "out.csv.failed.tsv").read_text()
    again = ["--input", str(source), "--out", str(table), *checkpoint, "--overwrite", "--marginal", "--top", "1"]
    assert main(["fill", *again]) == 0
    with open(table, newline="") as file:
        first, failed, _ = csv.DictReader(file)
    likely = json.loads(first["marginals"])
    assert first["independent"] == "CC" + likely[0][0][0] and len(likely) == 1 and failed["marginals"] == ""
    assert main(["fill", "C<mask>", *checkpoint, "--temperature", "0.5"]) == 2
    assert "say how many with --sample N" in capsys.readouterr().err
    assert main(["fill", *checkpoint]) == 2
    assert "give texts with masks, or a file with --input and --out" in capsys.readouterr().err


def test_draws_of_a_row_depend_on_its_number_alone(loaded):
    texts, settings = ["c1cc<mask>c<mask>c1"] * 4, FillSettings(sample=8, seed=3)
    whole = fill_texts(loaded, texts, settings)
    parts = fill_texts(loaded, texts[:2], settings) + fill_texts(loaded, texts[2:], settings, first=2)
    drawn = [[one.text for one in result.completions] for result in whole]
    assert drawn == [[one.text for one in result.completions] for result in parts]
    assert drawn[0] != drawn[2]


def test_tokens_that_the_policy_leaves_out_are_explained():
    tokenizer = SmilesTokenizer(["C", "O", "[C@H]"], {"stereo": "keep", "salts": "keep"})
    assert encode_masked(tokenizer, "C[C@H]<mask>O") == [5, 7, MASK, 6]
    dropped = SmilesTokenizer(["C", "O"], {"stereo": "drop", "salts": "largest_fragment"})
    for text, reason in (
        ("C[C@H]<mask>O", r"lacks '\[C@H\]'; the model was trained without stereo marks: leave out @, / and"),
        ("C<mask>.O", r"lacks '\.'; the model was trained on molecules of one fragment: give the largest alone"),
        ("C<mask>N", r"lacks 'N'$"),
    ):
        with pytest.raises(DataError, match=reason):
            encode_masked(dropped, text)


def test_from_python(loaded):
    model = exlm_dist.load(loaded.folder)
    filled = model.fill("CC<mask>", top=2)
    assert filled.completions == fill_text(loaded, "CC<mask>", FillSettings(top=2)).completions
    drawn = model.fill("CC<mask>", sample=4, seed=1)
    assert len(drawn.completions) == 4 and drawn == model.fill("CC<mask>", sample=4, seed=1)
    with pytest.raises(ConfigError, match="top = 0: must be at least 1"):
        model.fill("CC<mask>", top=0)
