"""prepare_text end to end: no word is lost, ids are ours, bad input is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from exlm_dist.data.shards import ShardDataset
from exlm_dist.prepare.demo.demo_text import demo_documents, prepare_demo_text
from exlm_dist.prepare.smiles import prepare_smiles
from exlm_dist.prepare.text import BlockCutter, prepare_text
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer, VocabularyTooLarge
from exlm_dist.tokenizers.tokenizer import NUM_SPECIAL
from exlm_dist.utils.errors import DataError


def blocks(folder: Path, split: str) -> list[list[int]]:
    dataset = ShardDataset.open(folder, split)
    tokens, lengths = dataset.read(np.arange(len(dataset)))
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    odd = "naïve  日本語\ttabs \u2028 and\u00a0spaces <mask> </s>\nsecond line of it"
    path.write_text("\n\n".join([*demo_documents()[:25], odd, "x" * 700]), encoding="utf-8")
    return path


def test_every_word_is_there_once_and_in_order(corpus: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("one more\n\ndocument\n", encoding="utf-8")
    summary = prepare_text(
        [str(corpus)], tmp_path / "o", vocab_size=900, max_length=40, valid_inputs=[str(held_out)], workers=1
    )
    tokenizer = load_tokenizer(tmp_path / "o")
    train = blocks(tmp_path / "o", "train")
    expected = corpus.read_text(encoding="utf-8").split()
    assert tokenizer.decode([token for block in train for token in block]).split() == expected
    assert min(min(block) for block in train) >= NUM_SPECIAL and max(map(len, train)) <= 38
    assert np.mean([len(block) for block in train]) > 35
    words = " ".join(tokenizer.decode(block) for block in train).split()
    assert [word for word in words if not set(word) <= {"x"}] == [word for word in expected if not set(word) <= {"x"}]
    assert tokenizer.decode(blocks(tmp_path / "o", "valid")[0]) == "one more document"
    assert summary.manifest["statistics"]["words"] == len(expected) + 3 and summary.manifest["vocab_size"] == 900
    assert summary.unknown_rate == 0 and summary.manifest["splits"]["train"]["unknown_tokens"] == 0


def test_split_by_content_holds_every_block(corpus: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        prepare_text(
            [str(corpus)], tmp_path / str(workers), vocab_size=900, max_length=64, valid_fraction=0.1, workers=workers
        )
    names = sorted(str(path.relative_to(tmp_path / "1")) for path in (tmp_path / "1").rglob("*") if path.is_file())
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    tokenizer = load_tokenizer(tmp_path / "1")
    train, valid = blocks(tmp_path / "1", "train"), blocks(tmp_path / "1", "valid")
    assert 0.05 < len(valid) / (len(train) + len(valid)) < 0.2
    words = sorted(" ".join(tokenizer.decode(block) for block in train + valid).split())
    assert set(corpus.read_text(encoding="utf-8").split()) - {"x" * 700} <= set(words)


def test_rows_are_documents_and_a_tokenizer_can_be_given(corpus: Path, tmp_path: Path) -> None:
    prepare_text([str(corpus)], tmp_path / "a", vocab_size=900, max_length=64, model_type="bpe", workers=1)
    path = tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in demo_documents()[:5]) + "{bad\n")
    (tmp_path / "v.txt").write_text("held-out")
    summary = prepare_text(
        [str(path)],
        tmp_path / "b",
        tokenizer=tmp_path / "a",
        max_length=64,
        valid_inputs=[str(tmp_path / "v.txt")],
        max_rejected=0.2,
    )
    assert summary.manifest["statistics"]["rows"] == 7 and summary.manifest["statistics"]["documents"] == 6
    assert summary.quarantined == {"not JSON": 1}
    tokenizer = load_tokenizer(tmp_path / "b")
    assert tokenizer.fingerprint == load_tokenizer(tmp_path / "a").fingerprint
    joined = [token for block in blocks(tmp_path / "b", "train") for token in block]
    assert tokenizer.decode(joined).split() == " ".join(demo_documents()[:5]).split()
    model = tmp_path / "a" / "tokenizer" / "sentencepiece.model"
    other = prepare_text([str(path)], tmp_path / "c", tokenizer=model, max_length=64, max_rejected=0.2, workers=1)
    assert other.manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint


def test_demo_text(tmp_path: Path) -> None:
    first = prepare_demo_text(tmp_path / "a", workers=1)
    assert first.sequences["train"] > 300 and first.manifest["vocab_size"] == 2000
    assert prepare_demo_text(tmp_path / "a").reused
    assert prepare_demo_text(tmp_path / "b").manifest["fingerprint"] == first.manifest["fingerprint"]


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_text_with_too_few_pieces_gets_the_vocabulary_that_it_fills(
    corpus: Path, tmp_path: Path, model_type: str
) -> None:
    summary = prepare_text([str(corpus)], tmp_path / "o", vocab_size=90_000, model_type=model_type, workers=1)
    size = summary.manifest["vocab_size"]
    assert 300 < size < 90_000 and f"vocabulary {size:,} (of 90,000: the text has no more pieces)" in summary.table()
    with pytest.raises(VocabularyTooLarge, match=r"at most \d+ fits") as caught:
        SentencePieceTokenizer.train(corpus.read_text().splitlines(), 90_000, model_type)
    fitting = SentencePieceTokenizer.train(corpus.read_text().splitlines(), caught.value.most, model_type)
    assert fitting.vocab_size == caught.value.most


def test_input_that_cannot_be_used(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="model_type = 'word'"):
        prepare_text([str(corpus)], tmp_path / "o", model_type="word")
    blank = tmp_path / "blank.txt"
    blank.write_text("\n \n\n")
    with pytest.raises(DataError, match=r"no words in blank.txt.*--column"):
        prepare_text([str(blank)], tmp_path / "o", workers=1)
    drugs = tmp_path / "drugs.txt"
    drugs.write_text("CC(=O)Oc1ccccc1C(=O)O\nCn1c(=O)c2c(ncn2C)n(C)c1=O\n" * 10)
    with pytest.raises(DataError, match="20 of the first 20 words read as SMILES .*exlm prepare smiles"):
        prepare_text([str(drugs)], tmp_path / "o", workers=1)
    prepare_smiles([str(drugs)], tmp_path / "s", workers=1)
    with pytest.raises(DataError, match="a smiles tokenizer; text needs a sentencepiece one"):
        prepare_text([str(corpus)], tmp_path / "o", tokenizer=tmp_path / "s")
    assert not (tmp_path / "o").exists()


def test_bytes_that_are_not_text_are_set_aside(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(corpus.read_bytes() + b"\n\ncaf\xe9 line\nnext line\n")
    summary = prepare_text([str(path)], tmp_path / "o", vocab_size=900, workers=1)
    assert summary.quarantined == {"not UTF-8": 1}
    assert "caf\\udce9 line" in (tmp_path / "o" / "quarantine.tsv").read_text()


def test_rows_without_text_are_set_aside_and_counted(corpus: Path, tmp_path: Path) -> None:
    prepare_text([str(corpus)], tmp_path / "a", vocab_size=900, workers=1)
    rows = [{"id": n, "text": text} for n, text in enumerate(demo_documents()[:9])]
    rows[2:6] = [{"id": 2}, {"id": 3, "text": ["a", "b"]}, {"id": 4, "text": None}, {"id": 5, "text": "nul\0"}]
    path = tmp_path / "b.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"tokenizer": tmp_path / "a", "valid_inputs": [str(corpus)], "workers": 1}
    summary = prepare_text([str(path)], tmp_path / "b", max_rejected=0.5, **given)
    assert summary.quarantined == {"no field": 1, "not text": 1, "empty": 1, "NUL character": 1}
    tokenizer = load_tokenizer(tmp_path / "b")
    joined = tokenizer.decode([token for block in blocks(tmp_path / "b", "train") for token in block])
    assert joined.split() == " ".join(row["text"] for row in [*rows[:2], *rows[6:]]).split()


def test_if_no_row_can_be_used_the_first_reason_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ["a"]}\n{"text": ["b"]}\n')
    with pytest.raises(DataError, match="no words in a.jsonl: 2 rows cannot be used, first .*row 1: not text: a list"):
        prepare_text([str(tmp_path / "a.jsonl")], tmp_path / "o", workers=1)


def test_the_format_that_is_said_decides_what_a_document_is(tmp_path: Path, corpus: Path) -> None:
    text = "\n\n".join(demo_documents()[:5])
    for name, said in (("a.txt", {}), ("wiki_00", {"format": "txt"})):
        (tmp_path / name).write_text(text)
        summary = prepare_text([str(tmp_path / name)], tmp_path / f"o{name}", vocab_size=600, workers=1, **said)
        counts = summary.manifest["statistics"]
        assert counts["documents"] == len([part for part in text.split("\n\n") if part.strip()])
        assert counts["rows"] == counts["kept"] == len([line for line in text.split("\n") if line.strip()])


@pytest.mark.parametrize("payload", [1, 3, 7, 50])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_cutter_keeps_every_id_and_cuts_at_words(payload: int, chunk: int) -> None:
    generator = np.random.default_rng(payload)
    tokens = generator.integers(0, 10, size=500).astype(np.int32)
    starts_word = np.arange(10) < 4
    cutter = BlockCutter(payload, starts_word)
    parts = [cutter.feed(tokens[first : first + chunk]) for first in range(0, 500, chunk)] + [cutter.finish()]
    joined, lengths = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    assert np.array_equal(joined, tokens) and lengths.sum() == 500 and lengths.max() <= payload and lengths.min() >= 1
    edges = np.cumsum(lengths)[:-1]
    hard = [edge for edge, length in zip(edges, lengths) if not starts_word[tokens[edge]]]
    for edge in hard:  # a word longer than a block: no start in the block before this cut
        assert not starts_word[tokens[edge - payload + 1 : edge]].any()
