"""Our tokenizers as `tokenizer.json` of the tokenizers library, with the same ids. It is JSON, written by hand."""

from __future__ import annotations

import base64
from typing import Any

from exlm_dist.tokenizers.sentencepiece_proto import BYTE, USER_DEFINED
from exlm_dist.tokenizers.sentencepiece_tokenizer import WORD_START, SentencePieceTokenizer
from exlm_dist.tokenizers.smiles_tokenizer import PATTERN, SmilesTokenizer
from exlm_dist.tokenizers.tokenizer import BOS, EOS, MASK, NUM_SPECIAL, PAD, SPECIAL_NAMES, UNK, Tokenizer
from exlm_dist.utils.errors import DataError

#: More spaces than any text begins with.
_ALL = 1 << 20


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Content of `tokenizer.json`. DataError for a sentencepiece model that the library cannot express."""
    if isinstance(tokenizer, SmilesTokenizer):
        parts = _smiles(tokenizer)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        parts = _sentencepiece(tokenizer)
    else:
        raise DataError(f"a tokenizer of type {type(tokenizer).__name__} cannot be exported.")
    special = [
        {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
        for i, name in enumerate(SPECIAL_NAMES)
    ]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special, **parts} | {
        "post_processor": _wrapping()
    }


def tokenizer_config(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """Content of `tokenizer_config.json`; max_length: longest sequence of the pretraining, BOS and EOS counted."""
    names = {"bos_token": BOS, "pad_token": PAD, "eos_token": EOS, "unk_token": UNK, "mask_token": MASK}
    names |= {"cls_token": BOS, "sep_token": EOS}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **{name: SPECIAL_NAMES[token] for name, token in names.items()},
    }


def _wrapping() -> dict[str, Any]:
    """BOS and EOS around the text; a second text follows the first EOS and has an EOS of its own."""

    def special(name: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    first, second = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    bos, eos = SPECIAL_NAMES[BOS], SPECIAL_NAMES[EOS]
    return {
        "type": "TemplateProcessing",
        "single": [special(bos), first, special(eos)],
        "pair": [special(bos), first, special(eos), second, special(eos)],
        "special_tokens": {
            name: {"id": name, "ids": [token], "tokens": [name]} for name, token in ((bos, BOS), (eos, EOS))
        },
    }


def _smiles(tokenizer: SmilesTokenizer) -> dict[str, Any]:
    # Their \d is any digit of Unicode.
    pattern = PATTERN.replace(r"\d", "[0-9]")
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        },
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {token: i for i, token in enumerate(tokenizer.tokens())},
            "unk_token": SPECIAL_NAMES[UNK],
        },
    }


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    model = tokenizer.model()
    pieces = [model.pieces[i] for i in tokenizer.model_ids()[NUM_SPECIAL:]]
    unsupported = {
        f"model type {model.model_type}": model.model_type not in ("unigram", "bpe"),
        "user-defined pieces": any(kind == USER_DEFINED for _, _, kind in pieces),
        "whitespace as a suffix": model.treat_whitespace_as_suffix,
        "whitespace that is not escaped": not model.escape_whitespaces,
    }
    for what, present in unsupported.items():
        if present:
            raise DataError(f"the sentencepiece model has {what}, which tokenizer.json cannot express exactly.")
    normalizers: list[dict[str, Any]] = []
    if model.precompiled_charsmap:
        charsmap = base64.b64encode(model.precompiled_charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.remove_extra_whitespaces:
        # As sentencepiece does it: U+0020 alone, but at the end also its own sign for it.
        normalizers += [_replace(" +", " "), _replace(r"\A ", ""), _replace(rf"[ {WORD_START}]+\z", "")]
    if model.add_dummy_prefix:
        normalizers.append({"type": "Prepend", "prepend": WORD_START})
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": WORD_START})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": WORD_START}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.add_dummy_prefix:
        spaces = _ALL if model.remove_extra_whitespaces else 1
        decoders.append({"type": "Strip", "content": " ", "start": spaces, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "decoder": {"type": "Sequence", "decoders": decoders},
        **(_unigram if model.model_type == "unigram" else _bpe)(pieces, model.byte_fallback),
    }


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _unigram(pieces: list[tuple[str, float, int]], byte_fallback: bool) -> dict[str, Any]:
    # Sentencepiece never takes the text "<0x41>" for the byte: its "<" is split off, so that the piece cannot match.
    splitting = {"type": "Split", "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"}, "behavior": "MergedWithPrevious"}
    # The least score decides what an unknown character costs; sentencepiece takes it from the ordinary pieces alone.
    vocabulary = [[name, 0.0] for name in SPECIAL_NAMES]
    vocabulary += [[piece, 0.0 if kind == BYTE else score] for piece, score, kind in pieces]
    return {
        "pre_tokenizer": splitting | {"invert": False} if byte_fallback else None,
        "model": {"type": "Unigram", "unk_id": UNK, "vocab": vocabulary, "byte_fallback": byte_fallback},
    }


def _bpe(pieces: list[tuple[str, float, int]], byte_fallback: bool) -> dict[str, Any]:
    scores = {piece: score for piece, score, kind in pieces if kind != BYTE}
    order = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    merges = [
        (-score, order[piece], order[piece[:cut]], [piece[:cut], piece[cut:]])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    names = [*SPECIAL_NAMES, *(piece for piece, _, _ in pieces)]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": SPECIAL_NAMES[UNK],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": {name: i for i, name in enumerate(names)},
        "merges": [merge for *_, merge in sorted(merges)],
    }
    return {"pre_tokenizer": None, "model": model}
