"""The suite squad: the rules of the official script on worked examples, windows, an evaluation as a user gives it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_text import make_squad, make_text_data, make_text_run, squad_document

from exlm_dist.cli import main
from exlm_dist.finetuning.answer_metrics import answer_scores, best_threshold, normalised_answer
from exlm_dist.finetuning.answer_windows import STRIDE, window_bounds
from exlm_dist.finetuning.dataset import Examples
from exlm_dist.finetuning.model_folder import MemberState
from exlm_dist.finetuning.span_criterion import MOST_TOKENS, Question, SpanCriterion
from exlm_dist.finetuning.span_model import build_span_model
from exlm_dist.inference.loading import LoadedCheckpoint, load_checkpoint
from exlm_dist.inference.sequences import unmasked_stream
from exlm_dist.suites.cells import read_results
from exlm_dist.suites.squad import SQUAD
from exlm_dist.suites.squad_data import SquadData
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.tokenizers.offsets import OffsetEncoder, character_spans
from exlm_dist.tokenizers.tokenizer import EOS
from exlm_dist.utils.errors import DataError

SHARED = Path(os.environ.get("EXLM_SHARED", "nowhere")) / "data" / "squad"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_run(tmp_path_factory.mktemp("text-run"))


@pytest.fixture(scope="module")
def loaded(run: Path) -> LoadedCheckpoint:
    return load_checkpoint(run, device="cpu")


@pytest.fixture(scope="module")
def squad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_squad(tmp_path_factory.mktemp("squad"))


def read(name: str, folder: Path) -> SquadData:
    return SQUAD.task(name).read(tuple(path for path in SQUAD.task(name).find(folder).values() if path is not None))


def command(run: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [
        *("evaluate", "squad", "--checkpoint", str(run), "--data", str(data), "--out", str(out), "--protocol", "quick"),
        *("--grid", "epochs=2", "lr=0.01", "--seeds", "1", "--jobs", "1", "--device", "cpu", *more),
    ]


@pytest.mark.parametrize(
    ("predicted", "answers", "exact", "f1"),
    [
        ("The Normans", ["Normans", "the Norse"], 1, 1),
        ("in the 10th century", ["10th and 11th centuries", "10th century"], 0, 0.8),
        ("Denmark, Iceland and Norway.", ["Denmark, Iceland and Norway"], 1, 1),
        ("France", ["Rollo"], 0, 0),
        ("", [], 1, 1),
        ("France", [], 0, 0),
        ("", ["France"], 0, 0),
        ("1,000 men", ["1000 men!"], 1, 1),
        ("a an the", [], 1, 1),
    ],
)
def test_answers_are_judged_by_the_official_rules(predicted: str, answers: list[str], exact: int, f1: float) -> None:
    assert answer_scores(predicted, answers) == (exact, pytest.approx(f1))


def test_an_answer_is_normalised_as_the_official_script_does_it() -> None:
    assert normalised_answer("  The  King's\tanthem-an (a) Song. ") == "kings antheman song"
    assert normalised_answer("theatre") == "theatre", "articles are whole words"


def test_the_best_threshold_is_the_best_of_all_that_there_are() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        count = int(generator.integers(1, 8))
        answerable = generator.random(count) < 0.6
        scores = np.where(answerable, generator.random(count).round(1), 0.0)
        odds = generator.integers(-2, 3, count).astype(float)
        means = {
            threshold: np.where(odds <= threshold, scores, ~answerable).mean() for threshold in (-np.inf, *set(odds))
        }
        found, threshold = best_threshold(scores, answerable, odds)
        assert found == pytest.approx(max(means.values())) == pytest.approx(means[threshold])


def test_the_best_span_is_the_best_of_all_that_there_are() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(4, 2, 50, generator=generator)
    outputs[:, :, 1:6] = -torch.inf
    outputs[2:, :, 40:] = -torch.inf
    criterion = SpanCriterion([], np.zeros(0), np.zeros(0), [], True)
    for row, (none, best, first, last) in zip(outputs, criterion.predict(outputs).tolist()):
        spans = {
            (i, j): float(row[0, i].double() + row[1, j].double())
            for i in range(1, 50)
            for j in range(i, min(i + MOST_TOKENS, 50))
        }
        assert best == max(spans.values()) == spans[int(first), int(last)]
        assert none == pytest.approx(float(row[0, 0] + row[1, 0]))


def test_windows_and_thresholds_make_one_answer_of_each_question() -> None:
    """Two windows of the first question, one of the second, which has no answer, and one of the third."""
    spans = [np.array([[0, 1], [2, 3], [4, 5], [6, 7]])] * 3
    questions = [Question("p q r s", ("r s",)), Question("p q r s", ()), Question("p q r s", ("q",))]
    criterion = SpanCriterion(questions, np.array([0, 0, 1, 2]), np.array([-3, -1, -3, -3]), spans, True)
    values = np.array([[1.0, 2.0, 3, 3], [9.0, 5.0, 3, 4], [4.0, 3.0, 3, 3], [7.0, 6.5, 4, 4]])
    examples = Examples(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros((4, 2)), ids=np.arange(4))
    numbers, predicted = criterion.answers(values, np.arange(4))
    assert numbers.tolist() == [0, 1, 2] and predicted.answers == ["r s", "p", "q"]
    assert predicted.odds.tolist() == [-4.0, 1.0, 0.5]
    scores = criterion.score(values, examples)
    assert scores["em"] == scores["f1"] == pytest.approx(2 / 3), "the third is said to have no answer"
    assert scores["best_em"] == scores["best_f1"] == 1.0, "at the threshold 0.5 all are right"
    assert scores["answerable_em"] == 0.5 and scores["unanswerable_em"] == 1.0
    always = SpanCriterion(questions, criterion.question_of, criterion.shift, spans, False).score(values, examples)
    assert always["em"] == always["best_em"] == pytest.approx(2 / 3) and always["answerable_em"] == 1.0


@pytest.mark.parametrize(("count", "room"), [(1, 10), (10, 10), (11, 10), (500, 300), (1000, 37), (3, 1)])
def test_windows_have_all_of_a_context(count: int, room: int) -> None:
    bounds = list(window_bounds(count, room))
    assert bounds[0][0] == 0 and bounds[-1][1] == count and all(end - begin <= room for begin, end in bounds)
    for (begin, end), (then, _) in zip(bounds, bounds[1:]):
        assert begin < then <= end and then - begin <= STRIDE


def test_tokens_know_where_they_are(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_text_data(tmp_path))
    text = "the fox saw \u265e M\u00fcller's (dog), 42%"
    ids, spans = OffsetEncoder(tokenizer).encode(text)
    assert ids.tolist() == tokenizer.encode(text)
    names = tokenizer.tokens()
    for i, (begin, end) in zip(ids, spans):
        piece = names[i].replace("\u2581", "")
        assert text[begin:end] == piece or (piece.startswith("<0x") and end - begin == 1)
    assert character_spans("\ufb01n", ["\u2581fi", "n"]).tolist() == [[0, 2], [0, 2]], "a word that NFKC changes"


def test_labels_are_the_tokens_of_the_answer_in_each_window(squad: Path, run: Path) -> None:
    data = read("squad2", squad)
    windows = data.encode(load_checkpoint(run, device="cpu").tokenizer, 40).windows
    examples, found = windows.examples, set()
    for number, (first, last) in enumerate(examples.labels.astype(int)):
        question = windows.question_of[number]
        if first:
            begin, end = windows.spans[question][[first + windows.shift[number], last + windows.shift[number]]]
            assert data.columns["context"][question][begin[0] : end[1]].startswith(data.answers[question][0])
            found.add(question)
    assert found == set(np.flatnonzero(data.labels[:, 0])), "each answer is in a window"
    assert len(examples) > len(data.places) and examples.lengths.max() == 40
    one = examples.take(np.array([0]))
    assert (one.tokens == EOS).sum() == 1


def test_scores_are_for_the_context_and_for_no_answer_alone(loaded: LoadedCheckpoint) -> None:
    model = build_span_model(loaded.model, loaded.config.model, seed=0, dropout=0.0, frozen=False)
    tokens, lengths = np.array([7, 8, EOS, 9, 10, 11, 7, EOS, 9], np.int32), np.array([6, 3])
    outputs = model(unmasked_stream(tokens, lengths))
    assert outputs.shape == (2, 2, 8)
    allowed = torch.isfinite(outputs[:, 0])
    assert allowed.tolist() == [[True, *[False] * 3, *[True] * 3, False], [True, False, False, True, *[False] * 4]]
    alone = model(unmasked_stream(tokens[6:], lengths[1:]))
    assert torch.allclose(alone[0, :, 3], outputs[1, :, 3], atol=1e-5)
    criterion = SpanCriterion([], np.zeros(0), np.zeros(0), [], True)
    labels = torch.tensor([[4.0, 5.0], [0.0, 0.0]])
    loss = criterion.loss(outputs, labels, torch.ones(2, 2))
    wanted = sum(-float(outputs[b, k].detach().log_softmax(0)[int(labels[b, k])]) for b in (0, 1) for k in (0, 1))
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.trainable().values())


def test_answers_are_where_they_are_in_texts_of_any_spacing(squad: Path) -> None:
    data = read("squad2", squad)
    for context, place, answers in zip(data.columns["context"], data.places_of_answers, data.answers):
        assert (place is None) == (not answers)
        assert "  " not in context and "\n" not in context
        assert place is None or context[slice(*place)] == answers[0]
    assert [len(rows) for rows in data.official.values()] == [24, 12] and data.labels.sum() == 24
    assert read("squad1", squad).labels.all()


def test_both_versions_are_judged_and_a_killed_training_goes_on(
    run: Path, squad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command(run, squad, tmp_path / "out", "--frozen")) == 0
    results, failures = read_results(tmp_path / "out")
    assert len(results) == 4 and not failures
    page = (tmp_path / "out" / "report" / "report.md").read_text()
    for row in ("| squad2 | f1 | 12 (8) |", "| squad2 | em |", "| squad2 | best_f1 |", "| squad1 | f1 | 8 (8) |"):
        assert row in page
    assert "Always the same answer reaches: squad2 0.333 (no answer), squad1 0.000 (no answer)." in page
    for one in results:
        scores = one["scores"]["valid"]
        assert scores["em"] <= scores["f1"] <= 1 and scores["best_em"] >= scores["em"]
        assert (scores["unanswerable_em"] is None) == (one["task"] == "squad1")
    saved = MemberState.save

    def killed(self: MemberState, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        saved(self, tensors, facts)
        raise KeyboardInterrupt

    monkeypatch.setattr(MemberState, "save", killed)
    again = command(run, squad, tmp_path / "again", "--tasks", "squad2")
    assert main(again) == 75
    monkeypatch.setattr(MemberState, "save", saved)
    assert main(again) == 0
    (own,) = read_results(tmp_path / "again")[0]
    (same,) = [one for one in results if one["task"] == "squad2" and not one["method"]["frozen"]]
    assert own["scores"] == same["scores"] and own["epochs"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda qa: qa.update(answers=[], is_impossible=True), "none of its 8 questions has an answer"),
        (lambda qa: qa["answers"][0].update(answer_start=0), "8 of 8 rows cannot be used .*: no answer at its place"),
        (lambda qa: qa.update(answers=[]), "and not marked as without one"),
        (lambda qa: qa.pop("answers"), "is not a file of SQuAD .* KeyError: 'answers'"),
    ],
)
def test_files_of_another_form_are_refused(change: Any, message: str, squad: Path, tmp_path: Path) -> None:
    content = squad_document(8, unanswerable=False)
    for paragraph in content["data"][0]["paragraphs"]:
        change(paragraph["qas"][0])
    path = tmp_path / "dev-v1.1.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        SQUAD.task("squad1").read((squad / "train-v1.1.json", path))
    path.write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        SQUAD.task("squad1").read((squad / "train-v1.1.json", path))


@pytest.mark.skipif(not SHARED.is_dir(), reason="EXLM_SHARED names no folder with data/squad")
def test_right_answers_to_the_real_questions_are_all_right() -> None:
    train, dev = (SHARED / f"mini-{part}-v2.0.json.gz" for part in ("train", "dev"))
    data = SQUAD.task("squad2").read((train, dev))
    assert not data.failed and [len(rows) for rows in data.official.values()] == [4449, 1629]
    assert data.labels[data.official["valid"]].sum() == 803
    for row in data.official["valid"]:
        place, answers = data.places_of_answers[row], data.answers[row]
        predicted = "" if place is None else data.columns["context"][row][slice(*place)]
        assert answer_scores(predicted, answers) == (1, 1)
