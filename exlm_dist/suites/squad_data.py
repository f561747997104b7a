"""The files of SQuAD: questions about paragraphs, with answers that are parts of them, or none."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from exlm_dist.finetuning.answer_windows import Windows, make_windows
from exlm_dist.finetuning.criterion import Criterion
from exlm_dist.finetuning.dataset import FailedRow
from exlm_dist.finetuning.finetune_settings import TrainingSettings
from exlm_dist.finetuning.span_criterion import Question, SpanCriterion
from exlm_dist.finetuning.splits import Parts
from exlm_dist.finetuning.targets import Target
from exlm_dist.suites.task_data import EncodedTask, TaskData, check_used, hash_of_files
from exlm_dist.tables.records import text_problem
from exlm_dist.tables.text_files import open_text
from exlm_dist.tokenizers import Tokenizer
from exlm_dist.utils.errors import DataError

_REMEDY = "Take the file as SQuAD has it."
_TARGET = Target("answer", "binary", ("absent", "present"))


@dataclass(frozen=True)
class EncodedSquad(EncodedTask):
    """See `EncodedTask`: an example is a window of the context of a question."""

    windows: Windows


@dataclass(frozen=True, kw_only=True)
class SquadData(TaskData):
    """See `TaskData`: a row is a question, labelled 1 if it has an answer. answers: right ones, [n]. places_of_answers:
    of the first one, first character in the context and the one behind its last, [n]."""

    answers: list[tuple[str, ...]]
    places_of_answers: list[tuple[int, int] | None]

    @property
    def pooled(self) -> bool:
        """See `TaskData.pooled`."""
        return False

    def encode(self, tokenizer: Tokenizer, max_tokens: int) -> EncodedSquad:
        """See `TaskData.encode`."""
        windows = make_windows(
            tokenizer,
            self.columns["question"],
            self.columns["context"],
            self.places_of_answers,
            max_tokens=max_tokens,
        )
        return EncodedSquad(windows.examples, windows.question_of, windows.cut, windows.unknown, windows)

    def criterion(self, encoded: EncodedTask, parts: Parts, settings: TrainingSettings) -> Criterion:
        """See `TaskData.criterion`. Where all questions of the training part have an answer, one is always given."""
        assert isinstance(encoded, EncodedSquad)
        windows = encoded.windows
        questions = [Question(*one) for one in zip(self.columns["context"], self.answers)]
        unanswerable = bool((self.labels[parts["train"]] == 0).any())
        return SpanCriterion(questions, windows.question_of, windows.shift, windows.spans, unanswerable)


class _Row(NamedTuple):
    """A question. place: of its first answer; problem: why it cannot be used."""

    question: str
    context: str
    answers: tuple[str, ...]
    place: tuple[int, int] | None
    problem: str


def read_squad(files: Mapping[str, Path]) -> SquadData:
    """The questions of the file of each part. DataError if a file is none of SQuAD, if less than half of its questions
    can be used, or if none of them has an answer."""
    rows: list[_Row] = []
    places: list[tuple[str, int]] = []
    failed: list[FailedRow] = []
    parts: Parts = {}
    for part, path in files.items():
        first, bad = len(rows), list[FailedRow]()
        for number, row in enumerate(_rows(path), 1):
            if row.problem:
                bad.append(FailedRow(str(path), number, row.problem, row.question))
                continue
            rows.append(row)
            places.append((str(path), number))
        check_used(path, len(rows) - first, bad, _REMEDY)
        if not any(row.answers for row in rows[first:]):
            raise DataError(
                f"{path}: none of its {len(rows) - first} questions has an answer: nothing can be "
                f"{'learned from' if part == 'train' else 'measured on'} it. {_REMEDY}"
            )
        parts[part] = np.arange(first, len(rows))
        failed += bad
    return SquadData(
        files=tuple(files.values()),
        sha256=hash_of_files(tuple(files.values())),
        columns={"question": [row.question for row in rows], "context": [row.context for row in rows]},
        keys=[f"{row.question}\0{row.context}" for row in rows],
        places=places,
        targets=(_TARGET,),
        labels=np.array([[float(bool(row.answers))] for row in rows]),
        failed=failed,
        official=parts,
        answers=[row.answers for row in rows],
        places_of_answers=[row.place for row in rows],
    )


def _rows(path: Path) -> Iterator[_Row]:
    """The questions of a file, in their order. DataError if it is none of SQuAD."""
    try:
        with open_text(path) as file:
            content = json.load(file)
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error}). {_REMEDY}") from error
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                context = _Context(paragraph["context"])
                for question in paragraph["qas"]:
                    yield _row(context, question)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: is not a file of SQuAD (data, paragraphs, context, qas, question, answers with text and "
            f"answer_start): {type(error).__name__}: {error}. {_REMEDY}"
        ) from error


class _Context:
    """A paragraph with one space between its words."""

    def __init__(self, text: str) -> None:
        self.text = " ".join(text.split())
        self._raw = text

    def place(self, begin: int, answer: str) -> tuple[int, int] | None:
        """Where an answer at character `begin` of the file's text is in `text`; None if it is not there."""
        end = begin + len(answer)
        if begin < 0 or not answer.strip() or self._raw[begin:end] != answer:
            return None
        before = " ".join(self._raw[:begin].split())
        own = " ".join(answer.split())
        gap = bool(before) and (self._raw[begin - 1].isspace() or answer[0].isspace())
        return len(before) + gap, len(before) + gap + len(own)


def _row(context: _Context, question: Mapping[str, Any]) -> _Row:
    asked = " ".join(question["question"].split())
    answers: Sequence[Mapping[str, Any]] = [] if question.get("is_impossible", False) else question["answers"]
    texts = tuple(str(answer["text"]) for answer in answers)
    found = (context.place(int(answer["answer_start"]), str(answer["text"])) for answer in answers)
    place = next((one for one in found if one is not None), None)
    problem = text_problem(asked) or text_problem(context.text)
    if not problem and not (asked and context.text):
        problem = "empty"
    if not problem and not question.get("is_impossible", False) and place is None:
        problem = "no answer at its place in the context" if texts else "no answer, and not marked as without one"
    return _Row(asked, context.text, texts, place, problem)
