"""What is measured at a ratio of masked tokens: by enumeration of small graphs, and against `exlm evaluate RUN`."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from made_run import MOLECULES, ids_of, make_config, make_data, make_run

from exlm_dist.data.masking import choose_masked
from exlm_dist.data.shards import ShardDataset
from exlm_dist.evaluation import completions_measured
from exlm_dist.evaluation.completions_measured import CompletionMeasures
from exlm_dist.evaluation.masked_lm import evaluate_checkpoint
from exlm_dist.evaluation.masked_measures import MaskedPositions, MaskedSettings, TokenMeasures, measure_masked
from exlm_dist.inference.completions import StateChain
from exlm_dist.inference.loading import LoadedCheckpoint, load_checkpoint
from exlm_dist.tokenizers import Tokenizer, load_tokenizer
from exlm_dist.tokenizers.tokenizer import PAD


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def dataset(data) -> ShardDataset:
    return ShardDataset.open(data, "valid")


@pytest.fixture(scope="module")
def tokenizer(data) -> Tokenizer:
    return load_tokenizer(data / "tokenizer")


@pytest.fixture(scope="module", params=["exlm", "mlm"])
def run(request, tmp_path_factory, data) -> Path:
    # Weights of some size, so that neither distributions nor transitions are uniform.
    settings = {"layers": 1, "width": 16, "heads": 2, "ffn": 32, "max_positions": 256, "dropout": 0.0, "init_std": 0.7}
    settings |= {"states": 3} if request.param == "exlm" else {"states": 1, "anchors": False}
    folder = tmp_path_factory.mktemp(request.param)
    return make_run(make_config(folder, request.param, data, model={**settings, "objective": request.param}))


@pytest.fixture(scope="module")
def loaded(run) -> LoadedCheckpoint:
    return load_checkpoint(run, device="cpu")


def random_chain(targets: int, states: int, words: int, seed: int) -> StateChain:
    """With anchors at both ends: targets 0 and N - 1 are no masks."""
    random = np.random.default_rng(seed)
    log_tokens = np.log(random.dirichlet(0.3 * np.ones(words), size=states))
    edges = random.normal(size=(states, states))
    masked = np.ones(targets, bool)
    masked[[0, -1]] = False
    return StateChain(log_tokens, edges, masked, ends=1, first=0)


def enumerated(chain: StateChain, states: int) -> tuple[np.ndarray, dict[tuple[int, ...], float]]:
    """(q_i(u) of the masks, P(w) of every completion), by walking every path from the first state to the last."""
    targets, words = len(chain.is_masked), chain.emissions.shape[1]
    prior, joint = np.zeros((targets, states)), dict.fromkeys(itertools.product(range(words), repeat=targets - 2), 0.0)
    total = 0.0
    for inner in itertools.combinations(range(1, states - 1), targets - 2):
        path = (0, *inner, states - 1)
        weight = math.exp(sum(chain._edges[u, v] for u, v in itertools.pairwise(path)))
        total += weight
        prior[range(targets), path] += weight
        for completion in joint:
            joint[completion] += weight * math.prod(chain.emissions[u, w] for u, w in zip(inner, completion))
    return prior[1:-1] / total, {completion: value / total for completion, value in joint.items()}


def test_tokens_are_measured_as_every_path_together_says():
    chain = random_chain(targets=4, states=6, words=3, seed=1)
    prior, joint = enumerated(chain, states=6)
    wanted = np.array([2, 0])
    made = TokenMeasures.of(prior, chain.emissions, wanted)
    single = np.zeros((2, 3))
    for completion, value in joint.items():
        for i, word in enumerate(completion):
            single[i, word] += value
    assert single.sum(1) == pytest.approx(1)
    assert made.nll == pytest.approx([-math.log(single[0, 2]), -math.log(single[1, 0])])
    assert made.confidence == pytest.approx(single.max(1)) and made.correct.tolist() == [
        single[0].argmax() == 2,
        single[1].argmax() == 0,
    ]
    assert made.entropy == pytest.approx([-sum(p * math.log(p) for p in row) for row in single])
    of_states = [-sum(p * math.log(p) for p in row) for row in chain.emissions]
    assert made.state_entropy == pytest.approx(prior @ of_states)
    assert (made.state_entropy <= made.entropy).all(), "knowing the state leaves less open"


def test_completions_are_measured_as_their_enumeration_says(tokenizer, monkeypatch):
    monkeypatch.setattr(completions_measured, "DRAWN", 4000)
    chain = random_chain(targets=5, states=7, words=3, seed=3)
    _, joint = enumerated(chain, states=7)
    ranked = sorted(joint, key=joint.get, reverse=True)
    measures = CompletionMeasures(tokenizer, seed=0)
    measures.add(0, np.arange(20, 26), np.array([1, 2, 4]), np.array(ranked[3]), chain)  # the fourth best is right
    scores = measures.means()
    assert scores["completed"] == 1 and scores["exact"] == 0 and scores["exact_in_10"] == 1
    assert scores["joint_accuracy"] == sum(a == b for a, b in zip(ranked[0], ranked[3])) / 3
    assert scores["joint_ece"] == pytest.approx(joint[ranked[0]])  # sure by so much, and wrong
    single = chain.marginals()
    assert scores["single_entropy"] == pytest.approx(-(single * np.log(single)).sum() / 3)
    exact = -sum(p * math.log(p) for p in joint.values()) / 3
    assert exact < scores["single_entropy"] - 0.05, "else the test says nothing"
    assert scores["joint_entropy"] == pytest.approx(exact, abs=0.01)  # of 4,000 draws


def test_what_is_right_later_than_the_tenth_does_not_count(tokenizer):
    chain = random_chain(targets=5, states=7, words=3, seed=2)
    ranked = sorted(enumerated(chain, states=7)[1].items(), key=lambda one: -one[1])
    for rank, among in ((9, 1), (10, 0)):
        measures = CompletionMeasures(tokenizer, seed=0)
        measures.add(0, np.arange(20, 26), np.array([1, 2, 4]), np.array(ranked[rank][0]), chain)
        assert measures.means()["exact_in_10"] == among


@pytest.mark.parametrize(("word", "readable"), [("C", 1), ("(", 0), ("1", 0), (None, 0)])
def test_a_completion_is_readable_if_rdkit_reads_it(tokenizer, data, word, readable):
    names = tokenizer.tokens()
    token = PAD if word is None else names.index(word)  # without its padding C-CO would be CO
    log_tokens = np.full((1, len(names)), -np.inf)
    log_tokens[0, token] = 0.0
    chain = StateChain(log_tokens, None, np.array([True]), ends=1, first=0)
    measures = CompletionMeasures(tokenizer, seed=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        measures.add(0, ids_of("CCO", data), np.array([1]), np.array([names.index("C")]), chain)
    scores = measures.means()
    assert [scores[f"valid_{kind}"] for kind in ("best", "independent", "drawn")] == [readable] * 3


def test_all_figures_that_exlm_evaluate_run_has_are_the_same(run, loaded, dataset):
    known = evaluate_checkpoint(run, sequences=12, complete=5, mask_ratio=0.3, device="cpu", record=False)
    made = measure_masked(loaded, dataset, np.arange(12), MaskedSettings(0.3, complete=5))
    scores = made["scores"]
    assert scores["tokens"] == known.count
    assert {name: scores[name] for name in known.values} == pytest.approx(known.values, rel=1e-5, abs=1e-6)
    plain = loaded.config.model.objective == "mlm"
    assert (scores["state_entropy"] == pytest.approx(scores["entropy"])) == plain
    assert (scores["joint_entropy"] == pytest.approx(scores["single_entropy"], rel=1e-6)) == plain
    assert sum(row["count"] for row in made["tables"]["reliability"]) == scores["tokens"]
    assert sum(made["tables"]["entropy"]) == sum(made["tables"]["state_entropy"]) == scores["tokens"]
    assert sum(row["count"] for row in made["tables"]["reliability_joint"]) == 5


def test_masks_depend_on_seed_sample_and_ratio_alone(dataset):
    def masked(samples: list[int], **settings) -> dict[int, list[int]]:
        ids = np.array(samples)
        found = MaskedPositions.of(dataset.lengths[ids], ids, MaskedSettings(**settings)).by_sample()
        return {sample: inner.tolist() for sample, (inner, _) in found.items()}

    all_of_them = masked(list(range(20)), ratio=0.3)
    assert masked([7, 3, 12], ratio=0.3) == {sample: all_of_them[sample] for sample in (7, 3, 12)}
    assert masked(list(range(20)), ratio=0.3, seed=1) != all_of_them
    more = masked(list(range(20)), ratio=0.5)
    assert all(set(inner) <= set(more[sample]) for sample, inner in all_of_them.items())


def test_the_hash_tells_other_masks_apart(dataset):
    def sha256(samples: np.ndarray, settings: MaskedSettings) -> str:
        return MaskedPositions.of(dataset.lengths[samples], samples, settings).sha256()

    samples = np.arange(9)
    settings = [MaskedSettings(0.3), MaskedSettings(0.3, seed=1), MaskedSettings(0.4), MaskedSettings(0.3, copies=2)]
    hashes = [sha256(samples, one) for one in settings[:3]] + [sha256(np.arange(8), settings[0])]
    assert len(set(hashes)) == 4 and sha256(samples, settings[0]) == hashes[0]


def test_a_model_is_asked_for_the_masked_tokens_of_its_batches(loaded, dataset):
    """The masks of `MaskedPositions` are those that the model sees."""
    from exlm_dist.data.loader import chosen_batches, evaluation_keys
    from exlm_dist.data.recipe import Recipe

    recipe = Recipe.for_evaluation(loaded.config, loaded.tokenizer.vocab_size)
    samples = np.array([4, 1, 8])
    positions = MaskedPositions.of(dataset.lengths[samples], samples, MaskedSettings(recipe.ratio, seed=5)).by_sample()
    for batch in chosen_batches(dataset, recipe, samples, seed=5):
        for row, sample in enumerate(batch.sample_ids.tolist()):
            targets = slice(*batch.cu_targets[row : row + 2])
            wanted = batch.target_ids[targets][batch.is_masked[targets]]
            (tokens, _) = dataset.read(np.array([sample]))
            assert tokens[positions[sample][0]].tolist() == wanted.tolist()
    lengths = dataset.lengths[samples].astype(np.int64)
    counts = np.array([len(positions[sample][0]) for sample in samples.tolist()])
    assert len(choose_masked(lengths, counts, evaluation_keys(samples, 5))) == counts.sum()


def test_repeated_tokens_are_told_apart_by_whether_a_copy_is_visible(loaded, dataset):
    scores = measure_masked(loaded, dataset, np.arange(10), MaskedSettings(0.5, copies=3))["scores"]
    assert scores["hidden_fraction"] == pytest.approx(0.5**3, abs=0.06)
    fraction = scores["hidden_fraction"] * 3 * dataset.lengths[:10].sum() / scores["tokens"]  # of the masked ones
    for name in ("nll", "accuracy", "entropy"):
        both = fraction * scores[f"hidden_{name}"] + (1 - fraction) * scores[f"copied_{name}"]
        assert scores[name] == pytest.approx(both, rel=1e-5)
    assert "exact" not in scores
    single = measure_masked(loaded, dataset, np.arange(10), MaskedSettings(0.5, copies=1))["scores"]
    assert single["hidden_nll"] == pytest.approx(single["nll"]) and single["copied_nll"] is None
    assert single["hidden_fraction"] == pytest.approx(0.5, abs=0.06)
    assert len(MOLECULES) == 10 and scores["tokens"] == pytest.approx(1.5 * dataset.lengths[:10].sum(), abs=10)
