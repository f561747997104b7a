"""Questions and their contexts as windows of tokens that a model can read, `BOS question EOS part-of-context EOS`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from exlm_dist.finetuning.dataset import Examples
from exlm_dist.tokenizers import Tokenizer
from exlm_dist.tokenizers.offsets import OffsetEncoder
from exlm_dist.tokenizers.tokenizer import EOS, UNK

#: Those of BERT for SQuAD: tokens of a window with BOS and both EOS, tokens of a question, and how many tokens of the
#: context lie between the beginnings of two windows.
LONGEST, LONGEST_QUESTION, STRIDE = 384, 64, 128


@dataclass(frozen=True)
class Windows:
    """w windows of n questions; see `SpanCriterion`.

    Args:
        examples: the windows, with the first and the last token of the answer as labels. cut: questions that have lost
        their end. unknown: questions with a token that the vocabulary lacks, in them or in their context.
    """

    examples: Examples
    question_of: np.ndarray
    shift: np.ndarray
    spans: list[np.ndarray]
    cut: int
    unknown: int


def make_windows(
    tokenizer: Tokenizer,
    questions: Sequence[str],
    contexts: Sequence[str],
    answers: Sequence[tuple[int, int] | None],
    *,
    max_tokens: int,
) -> Windows:
    """The windows of questions, in their order. Texts have one space between their words; answers: the first character
    in the context and the one behind the last; max_tokens: of a sequence, BOS and the last EOS not counted."""
    encoder = OffsetEncoder(tokenizer)
    known: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    tokens, labels, question_of, shift, spans = [], [], [], [], []
    room = min(LONGEST - 2, max_tokens) - 1  # of question and context
    cut = unknown = 0
    for number, (question, context, answer) in enumerate(zip(questions, contexts, answers)):
        if context not in known:
            known[context] = encoder.encode(context)
        text, places = known[context]
        ids = np.array(tokenizer.encode(question), np.int32)
        asked = ids[: min(LONGEST_QUESTION, room // 2)]
        cut += len(asked) < len(ids)
        unknown += UNK in ids or UNK in text
        spans.append(places)
        ends = None if answer is None else answer_tokens(places, *answer)
        for begin, end in window_bounds(len(text), room - len(asked)):
            first = len(asked) + 2  # behind BOS, the question and EOS
            inside = ends is not None and begin <= ends[0] and ends[1] < end
            labels.append([end_ + first - begin for end_ in ends] if inside and ends is not None else [0, 0])
            tokens.append(np.concatenate([asked, np.array([EOS], np.int32), text[begin:end]]))
            question_of.append(number)
            shift.append(begin - first)
    lengths = np.array([len(window) for window in tokens], np.int64)
    ids_of = np.arange(len(tokens))
    examples = Examples(np.concatenate(tokens), lengths, np.array(labels, np.float64), ids=ids_of)
    return Windows(examples, np.array(question_of), np.array(shift), spans, cut, unknown)


def window_bounds(count: int, room: int) -> Iterator[tuple[int, int]]:
    """First token and the one behind the last of each window of `count` tokens of which each has `room` for some. Where
    a window has little room, the next one begins at its middle, so that each part of a text is in one as a whole."""
    stride = max(1, min(STRIDE, room // 2))
    begin = 0
    while True:
        yield begin, min(begin + room, count)
        if begin + room >= count:
            return
        begin += stride


def answer_tokens(spans: np.ndarray, begin: int, end: int) -> tuple[int, int]:
    """First and last token with a character of the answer, the characters from `begin` to `end` - 1."""
    first = int(np.searchsorted(spans[:, 1], begin, side="right"))
    return first, int(np.searchsorted(spans[:, 0], end, side="left")) - 1
