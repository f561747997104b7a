"""`tokenizer.json` gives the ids that our tokenizers give."""

from __future__ import annotations

import io
import json
import random
from collections import Counter

import pytest
from locations import ROOT
from made_run import MOLECULES

from exlm_dist.export.hf.tokenizer_json import tokenizer_config, tokenizer_json
from exlm_dist.tokenizers.sentencepiece_proto import SentencePieceModel
from exlm_dist.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from exlm_dist.tokenizers.smiles_tokenizer import SmilesTokenizer, split_smiles
from exlm_dist.tokenizers.tokenizer import BOS, EOS, MASK, SPECIAL_NAMES, UNK
from exlm_dist.utils.errors import DataError

SENTENCES = [line for path in sorted(ROOT.glob("docs/*.md")) for line in path.read_text().splitlines() if line.strip()]
ODD = [
    "",
    " ",
    "   leading and   inner spaces  ",
    "tab\tand\nnewline \n kept",
    "no-break\u00a0space, thin\u2009space, ideographic\u3000space",
    "na\u00efve cafe\u0301 \u212b \ufb01 \u1e9b\u0323",
    "\u4f60\u597d, \u0645\u0631\u062d\u0628\u0627, \u05e9\u05dc\u05d5\u05dd, \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U00010348",
    "zero\u200bwidth \ufeffmark \u00adhyphen",
    "\u2581 literal \u2581 sign \u2581",
    "\u2581\u2581",
    "literal <0x41> byte",
    "control \x00 \x1f \x7f characters",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa !!!!!!!! ........",
]


def text_tokenizer(model_type: str) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train(SENTENCES, 1200, model_type)


def loaded(tokenizer):
    library = pytest.importorskip("tokenizers", minversion="0.20", reason="the tokenizers library is not installed")
    return library.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))


def smiles_tokenizer() -> SmilesTokenizer:
    counts = Counter(token for smiles in MOLECULES for token in split_smiles(smiles))
    return SmilesTokenizer.from_counts(counts + Counter(["[Na+]", "%12", "Cl", "Br"]), {"stereo": "keep"})


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_model_file_is_read_as_sentencepiece_reads_it(model_type):
    tokenizer = text_tokenizer(model_type)
    model, processor = tokenizer.model(), tokenizer._processor
    assert model.model_type == model_type and model.byte_fallback and not model.precompiled_charsmap
    assert [piece for piece, _, _ in model.pieces] == [processor.IdToPiece(i) for i in range(len(model.pieces))]
    assert [score for _, score, _ in model.pieces] == [processor.GetScore(i) for i in range(len(model.pieces))]
    for broken in (b"text", tokenizer._model[:-3]):
        with pytest.raises(DataError, match="not a sentencepiece model"):
            SentencePieceModel.parse(broken)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_text_has_our_ids(model_type):
    ours = text_tokenizer(model_type)
    theirs = loaded(ours)
    assert [theirs.id_to_token(i) for i in range(ours.vocab_size)] == ours.tokens()
    draw = random.Random(0)
    letters = [chr(code) for code in (*range(32, 127), *range(0xA0, 0x180), 0x2581, 0x3000, 0x4E00, 0x1F600)]
    noise = ["".join(draw.choices(letters, k=30)) for _ in range(300)]
    for text in [*ODD, *SENTENCES, *noise]:
        ids = theirs.encode(text, add_special_tokens=False).ids
        if not any(name in text for name in SPECIAL_NAMES):
            assert ids == ours.encode(text), repr(text)
            assert theirs.decode(ids) == ours.decode(ids), repr(text)


def test_smiles_have_our_ids_and_come_back():
    ours = smiles_tokenizer()
    theirs = loaded(ours)
    for smiles in [*MOLECULES, "[Na+].Cl", "C%12CC%12", "C[C@@H](N)Br", "[13CH3]%(123)"]:
        encoded = theirs.encode(smiles, add_special_tokens=False)
        assert encoded.ids == ours.encode(smiles)
        if UNK not in encoded.ids:
            assert theirs.decode(encoded.ids) == smiles
    assert theirs.encode("C\u0661").ids[1:-1] == [ours.encode("C")[0], UNK]


def test_special_tokens_and_template():
    theirs = loaded(smiles_tokenizer())
    ids = theirs.encode("C<mask>C").ids
    assert ids[0] == BOS and ids[2] == MASK and ids[-1] == EOS and len(ids) == 5
    assert theirs.encode("C", "N").ids.count(EOS) == 2
    config = tokenizer_config(smiles_tokenizer(), 77)
    assert config["mask_token"] == "<mask>" and config["model_max_length"] == 77


def foreign_tokenizer(**settings) -> SentencePieceTokenizer:
    """A sentencepiece model with ids and switches other than ours."""
    import sentencepiece

    out = io.BytesIO()
    trained = {"vocab_size": 600, "minloglevel": 2, **settings}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(SENTENCES), model_writer=out, **trained)
    return SentencePieceTokenizer(out.getvalue())


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"user_defined_symbols": ["<sep>"]}, "user-defined"),
        ({"model_type": "char", "vocab_size": 60}, "model type char"),
        ({"treat_whitespace_as_suffix": True}, "suffix"),
    ],
)
def test_models_that_cannot_be_expressed_are_refused(settings, words):
    with pytest.raises(DataError, match=words):
        tokenizer_json(foreign_tokenizer(**settings))


@pytest.mark.parametrize(
    "settings",
    [{"normalization_rule_name": "nmt_nfkc"}, {"add_dummy_prefix": False}, {"remove_extra_whitespaces": False}],
    ids=str,
)
def test_foreign_models_keep_their_ids(settings):
    ours = foreign_tokenizer(**settings)
    theirs = loaded(ours)
    for text in [*SENTENCES, *ODD[:5], "\ufb01ne \uff21\uff22 \u2460"]:
        if not any(name in text for name in SPECIAL_NAMES):
            assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text), repr(text)
