"""A tiny run on texts, and small files in the form of GLUE and SQuAD, for tests."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from made_run import make_config, make_run

from exlm_dist.data.manifest import MANIFEST, SCHEMA, sealed
from exlm_dist.prepare.shard_writer import ShardWriter
from exlm_dist.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

WHO, DID, WHAT = ("the fox", "a dog", "our cat", "one bird"), ("saw", "fed", "lost"), ("Mary", "the key", "a town")
MODEL = {"layers": 1, "width": 16, "heads": 2, "ffn": 32, "max_positions": 96}


def sentences() -> list[str]:
    """36 short sentences."""
    return [f"{who} {did} {what}." for who, did, what in itertools.product(WHO, DID, WHAT)]


def make_text_data(folder: Path, vocab_size: int = 287) -> Path:
    """A prepared folder of these sentences."""
    tokenizer = SentencePieceTokenizer.train(sentences(), vocab_size)
    tokenizer.save(folder / "tokenizer")
    splits = {}
    for split in ("train", "valid"):
        writer = ShardWriter(folder, split, vocab_size=tokenizer.vocab_size)
        writer.write(*tokenizer.encode_batch(sentences()))
        splits[split] = {"sequences": len(sentences()), "shards": [entry.as_dict() for entry in writer.close()]}
    manifest = {
        "schema": SCHEMA,
        "domain": "text",
        "vocab_size": tokenizer.vocab_size,
        "max_length": 64,
        "splits": splits,
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "files": {}},
    }
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))
    return folder


def make_text_run(folder: Path) -> Path:
    """Run folder of a tiny ExLM of texts, with one checkpoint."""
    data = make_text_data(folder / "data")
    return make_run(make_config(folder, "tiny_text", data, model={**MODEL, "objective": "exlm", "states": 2}))


def write_lines(path: Path, rows: list[list[Any]]) -> Path:
    """A table with a tab between the columns and no quotes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")
    return path


def make_glue(folder: Path) -> Path:
    """All nine tasks in the form of GLUE's zip archive: 24 rows to train, 12 for each dev part."""
    texts = sentences()
    pairs = list(zip(texts, texts[1:] + texts[:1]))
    same, entailed = [n % 2 for n in range(36)], [("entailment", "not_entailment")[n % 2] for n in range(36)]
    three = [("entailment", "neutral", "contradiction")[n % 3] for n in range(36)]
    tables: dict[str, tuple[list[Any] | None, list[list[Any]]]] = {
        "CoLA": (None, [["gj04", n, "*" if n == 0 else "", text] for n, text in zip(same, texts)]),
        "SST-2": (["sentence", "label"], [[text, n] for n, text in zip(same, texts)]),
        "MRPC": (
            ["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
            [[n, 1, 2, *pair] for n, pair in zip(same, pairs)],
        ),
        "STS-B": (
            ["index", "genre", "sentence1", "sentence2", "score"],
            [[n, "g", *pair, f"{n % 11 / 2:.3f}"] for n, pair in enumerate(pairs)],
        ),
        "QQP": (
            ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
            [[7, 1, 2, *pair, n] for n, pair in zip(same, pairs)],
        ),
        "QNLI": (["index", "question", "sentence", "label"], [[0, *p, n] for n, p in zip(entailed, pairs)]),
        "RTE": (["index", "sentence1", "sentence2", "label"], [[0, *p, n] for n, p in zip(entailed, pairs)]),
        "WNLI": (["index", "sentence1", "sentence2", "label"], [[0, *p, n] for n, p in zip(same, pairs)]),
    }
    for name, (header, rows) in tables.items():
        above = [] if header is None else [header]
        write_lines(folder / name / "train.tsv", above + rows[:24])
        write_lines(folder / name / "dev.tsv", above + rows[24:])
    header, rows = ["index", "sentence1", "sentence2", "label1", "gold_label"], [[0, *p, "x"] for p in pairs]
    mnli = [[*row, label] for row, label in zip(rows, three)]
    write_lines(folder / "MNLI" / "train.tsv", [header, *mnli[:24]])
    write_lines(folder / "MNLI" / "dev_matched.tsv", [header, *mnli[24:]])
    write_lines(folder / "MNLI" / "dev_mismatched.tsv", [header, *mnli[24:]])
    return folder


def squad_document(count: int, *, unanswerable: bool) -> dict[str, Any]:
    """`count` paragraphs with a question each, every other one of them with one more that has no answer."""
    paragraphs = []
    for number, text in zip(range(count), itertools.cycle(sentences())):
        context = f"In  year {number}, {text} Then\n{text} It was late."
        answer = text.split()[-1].rstrip(".")
        qas: list[dict[str, Any]] = [
            {
                "id": f"q{number}",
                "question": f"What was it in year {number}?",
                "answers": [{"text": answer, "answer_start": context.index(answer)}],
            }
        ]
        if unanswerable:
            qas[0]["is_impossible"] = False
            qas.append({"id": f"n{number}", "question": "Who went home?", "answers": [], "is_impossible": True})
        paragraphs.append({"context": context, "qas": qas[: 2 - number % 2]})
    return {"version": "v2.0" if unanswerable else "1.1", "data": [{"title": "T", "paragraphs": paragraphs}]}


def make_squad(folder: Path) -> Path:
    """Both versions, 16 paragraphs to train and 8 for the dev part."""
    folder.mkdir(parents=True, exist_ok=True)
    for version in ("v2.0", "v1.1"):
        for part, count in (("train", 16), ("dev", 8)):
            content = squad_document(count, unanswerable=version == "v2.0")
            (folder / f"{part}-{version}.json").write_text(json.dumps(content))
    return folder
