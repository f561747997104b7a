"""Both tokenizers: nothing is lost, no text produces special ids, loading restores what was saved."""

import importlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.tokenizers.sentencepiece_tokenizer import MODEL_FILE, SentencePieceTokenizer
from exlm_dist.tokenizers.smiles_tokenizer import SmilesTokenizer, split_smiles
from exlm_dist.tokenizers.tokenizer import BOS, EOS, MASK, NUM_SPECIAL, PAD, UNK
from exlm_dist.utils.errors import DataError

POLICY = {"canonical": True, "stereo": "keep", "salts": "keep", "rdkit": "x"}
HARD = [
    "C[C@@H](N)C(=O)O",
    "F/C=C\\F",
    "[13CH3][NH3+].[Cl-]",
    "C%10CCCCC%10",
    "C%(123)CCCCC%(123)",
    "[Fe+2]",
    "c1ccc2c(c1)[nH]c1ccccc12",
    "Brc1cc(Cl)ccc1I",
    "[O-][N+](=O)c1ccccc1",
    "B1OB1",
    "[Na+]~[Cl-]",
    "CC#N",
    "[se]1cccc1",
    "*C(C)C",
    "[2*]CC",
    "O->[Cu]<-N",
    "[C:1]",
    "S=P(O)(O)O",
]


@pytest.mark.parametrize("smiles", HARD)
def test_smiles_tokens_join_to_the_input(smiles: str) -> None:
    assert "".join(split_smiles(smiles)) == smiles


def test_two_letter_atoms_brackets_and_rings_are_one_token() -> None:
    assert split_smiles("BrC[C@@H]Cl%12%(123)") == ["Br", "C", "[C@@H]", "Cl", "%12", "%(123)"]


@pytest.mark.parametrize("text", ["Hello world", "CC(C", "C[C", "CCé", "C C", "C%1x", "Cl²"])
def test_text_that_is_not_smiles_is_not_tokenised_in_part(text: str) -> None:
    tokens = split_smiles(text)
    assert tokens is None or "".join(tokens) == text
    if text != "CC(C":
        assert tokens is None
        with pytest.raises(DataError, match="does not consist of SMILES tokens"):
            SmilesTokenizer(["C"], POLICY).encode(text)


def test_smiles_vocabulary_round_trip_and_unknown(tmp_path: Path) -> None:
    counts = Counter(token for smiles in HARD for token in split_smiles(smiles))
    tokenizer = SmilesTokenizer.from_counts(counts, POLICY)
    assert tokenizer.vocab_size == NUM_SPECIAL + len(counts) and tokenizer.tokens()[NUM_SPECIAL] == "c"
    for smiles in HARD:
        ids = tokenizer.encode(smiles)
        assert min(ids) >= NUM_SPECIAL and tokenizer.decode([BOS, *ids, EOS, PAD]) == smiles
    assert tokenizer.encode("C[Xe]C") == [tokenizer.encode("C")[0], UNK, tokenizer.encode("C")[0]]
    assert tokenizer.decode([MASK, UNK]) == "<mask><unk>"
    tokens, lengths = tokenizer.encode_batch(HARD)
    assert tokens.tolist() == [token for smiles in HARD for token in tokenizer.encode(smiles)] and lengths.sum() == len(
        tokens
    )
    tokenizer.save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    assert (
        loaded.fingerprint == tokenizer.fingerprint
        and loaded.policy == POLICY
        and loaded.encode(HARD[0]) == tokenizer.encode(HARD[0])
    )
    assert SmilesTokenizer.from_counts(counts, {**POLICY, "stereo": "drop"}).fingerprint != tokenizer.fingerprint
    assert SmilesTokenizer.from_counts(counts, POLICY, min_count=2).vocab_size < tokenizer.vocab_size


def _batches(rng: np.random.Generator, number: int) -> Iterator[list[str]]:
    """Lines of random tokens, frequent and rare ones, in every other batch with a character changed somewhere."""
    common = ["C", "c", "N", "O", "(", ")", "=", "1", "2", "Cl", "Br", "[nH]", "[C@@H]", "[O-]", "%12", "-", "B"]
    rare = [">", "%(123)", "->", "<-", "[13CH3+2]", "[Xe]", "I", "$", "\\", "\n", "[C%12Cl]", "[é]"]
    changed = list("lrBC[]%<>-(1x \té\n")
    for batch in range(number):
        pool = common + rare[: batch % (len(rare) + 1)] * (batch % 3 == 0)
        lines = ["".join(rng.choice(pool, rng.integers(1, 30))) for _ in range(rng.integers(20, 60))]
        if batch % 2:
            row = int(rng.integers(len(lines)))
            place = int(rng.integers(len(lines[row])))
            lines[row] = lines[row][:place] + str(rng.choice(changed)) + lines[row][place + 1 :]
        yield lines


def test_a_batch_has_the_tokens_of_the_expression() -> None:
    rng = np.random.default_rng(0)
    tokenizer = SmilesTokenizer([*"CcNO()=12-B", "Cl", "Br", "[nH]", "[O-]", "%12", "%(123)", "->", "<-"], POLICY)
    at_once = refused = 0
    for lines in _batches(rng, 500):
        expected: list[list[int]] | str
        try:
            expected = [tokenizer.encode(line) for line in lines]
        except DataError as error:
            expected = str(error)
        try:
            flat, lengths = tokenizer.encode_batch(lines)
            ends = np.cumsum(lengths)
            found: list[list[int]] | str = [row.tolist() for row in np.split(flat, ends[:-1])]
            assert ends[-1] == len(flat) and flat.dtype == np.int32
        except DataError as error:
            found = str(error)
        assert found == expected
        refused += isinstance(found, str)
        at_once += tokenizer._ids_of_lines("\n".join(lines)) is not None
    assert at_once > 150 and refused > 100


def test_what_is_not_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer in this folder"):
        load_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text("{")
    with pytest.raises(DataError, match="not readable as JSON"):
        load_tokenizer(tmp_path)
    file.write_text('{"kind": "other"}')
    with pytest.raises(DataError, match="kind is 'other'; it must be one of"):
        load_tokenizer(tmp_path)
    file.write_text('{"kind": "smiles", "pattern": "x"}')
    with pytest.raises(DataError, match="a token expression other than"):
        load_tokenizer(tmp_path)


SENTENCES = [
    f"the {a} {b} of number {n} is written in a {b} way"
    for n in range(40)
    for a in ("quick", "lazy", "brown")
    for b in ("fox", "dog", "house", "river")
]


@pytest.fixture(scope="module")
def text_tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train(SENTENCES, 300)


def test_text_ids_and_round_trip(text_tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    assert text_tokenizer.vocab_size == 300
    for text in (SENTENCES[0], "日本語 and ÿ, \u0301 odd things", "<mask> </s> <s> <pad> <unk>"):
        ids = text_tokenizer.encode(text)
        assert min(ids) >= NUM_SPECIAL and text_tokenizer.decode([BOS, *ids, EOS]) == text
    assert (
        text_tokenizer.decode([*text_tokenizer.encode("the"), MASK, *text_tokenizer.encode("fox")]) == "the <mask> fox"
    )
    assert text_tokenizer.encode("") == []
    tokens, lengths = text_tokenizer.encode_batch(["the fox", "a"])
    assert tokens.tolist() == text_tokenizer.encode("the fox") + text_tokenizer.encode("a") and len(lengths) == 2
    text_tokenizer.save(tmp_path / "tokenizer")
    assert load_tokenizer(tmp_path).fingerprint == text_tokenizer.fingerprint
    with open(tmp_path / "tokenizer" / MODEL_FILE, "ab") as file:
        file.write(b"\0")
    with pytest.raises(DataError, match=r"sentencepiece.model"):
        load_tokenizer(tmp_path)


def test_training_is_reproducible(text_tokenizer: SentencePieceTokenizer) -> None:
    assert SentencePieceTokenizer.train(SENTENCES, 300).fingerprint == text_tokenizer.fingerprint


def test_a_foreign_model_gets_our_ids(tmp_path: Path) -> None:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=60,
        model_type="bpe",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    path = tmp_path / "foreign.model"
    path.write_bytes(model.getvalue())
    tokenizer = SentencePieceTokenizer.from_model_file(path)
    assert tokenizer.vocab_size == 60 - 3 + NUM_SPECIAL
    ids = tokenizer.encode(SENTENCES[3])
    assert min(ids) >= NUM_SPECIAL and max(ids) < tokenizer.vocab_size and tokenizer.decode(ids) == SENTENCES[3]
    assert UNK in tokenizer.encode("日")
    path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="not readable as a sentencepiece model"):
        SentencePieceTokenizer.from_model_file(path)


@pytest.mark.parametrize(("size", "message"), [(50_000, r"at most \d+ fits"), (50, r"too small: .* need \d+")])
def test_vocabulary_that_cannot_be_made(size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        SentencePieceTokenizer.train(SENTENCES, size)


def test_saved_json_is_plain(tmp_path: Path) -> None:
    SmilesTokenizer(["C", "O"], POLICY).save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert content["vocabulary"] == ["C", "O"] and content["policy"]["stereo"] == "keep"


def test_the_former_place_of_the_loader_says_where_it_is_now() -> None:
    with pytest.warns(DeprecationWarning, match="exlm_dist.tokenizers; import from there"):
        former = importlib.reload(importlib.import_module("exlm_dist.data.tokenizer"))
    assert former.load_tokenizer is load_tokenizer
