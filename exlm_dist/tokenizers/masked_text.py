"""Text or SMILES with masks in it to token ids. A mask stands for one token, as in training. No torch here."""

from __future__ import annotations

import re

from exlm_dist.tokenizers.sentencepiece_tokenizer import WORD_START
from exlm_dist.tokenizers.smiles_tokenizer import SmilesTokenizer, split_smiles
from exlm_dist.tokenizers.tokenizer import MASK, UNK, Tokenizer
from exlm_dist.utils.errors import DataError

#: How people write a mask.
MASK_SIGNS = re.compile(r"<mask>|\[MASK\]", re.IGNORECASE)
#: A private character that stands for a mask while sentencepiece reads the text; no piece has it.
_PLACEHOLDER = "\ue5ff"


def encode_masked(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text`, MASK where it says `<mask>` or `[MASK]`; without BOS and EOS.

    SMILES are taken as they are written, as what is incomplete has no canonical form. In text the space before a mask
    is part of the token that is looked for, which may begin a word or continue one. DataError, whose message is the
    reason alone: no mask, or parts that are no tokens.
    """
    if not MASK_SIGNS.search(text):
        raise DataError("no mask in it: write <mask> or [MASK] for each token to fill")
    if isinstance(tokenizer, SmilesTokenizer):
        return _smiles(tokenizer, text)
    return _pieces(tokenizer, text)


def _smiles(tokenizer: SmilesTokenizer, text: str) -> list[int]:
    ids: list[int] = []
    for number, part in enumerate(MASK_SIGNS.split(text.strip())):
        if number:
            ids.append(MASK)
        if split_smiles(part) is None:
            raise DataError(f"{part!r} does not consist of SMILES tokens (a bracket atom [...] is one token)")
        found = tokenizer.encode(part)
        if UNK in found:
            unknown = [token for token, i in zip(split_smiles(part) or [], found) if i == UNK]
            raise DataError(_lacking(tokenizer, list(dict.fromkeys(unknown))))
        ids += found
    return ids


def _lacking(tokenizer: SmilesTokenizer, unknown: list[str]) -> str:
    """Why a molecule with tokens that the vocabulary lacks cannot be read, and what else to write."""
    hint = ""
    if tokenizer.policy["stereo"] == "drop" and any(set(token) & set("@/\\") for token in unknown):
        hint = "; the model was trained without stereo marks: leave out @, / and \\"
    elif tokenizer.policy["salts"] == "largest_fragment" and "." in unknown:
        hint = "; the model was trained on molecules of one fragment: give the largest alone"
    return f"the vocabulary of the model lacks {', '.join(map(repr, unknown))}{hint}"


def _pieces(tokenizer: Tokenizer, text: str) -> list[int]:
    if _PLACEHOLDER in text:
        raise DataError(f"it has the private character U+{ord(_PLACEHOLDER):04X}")
    names = tokenizer.tokens()
    sign = [i for i in tokenizer.encode(_PLACEHOLDER) if names[i] != WORD_START]
    found = tokenizer.encode(MASK_SIGNS.sub(_PLACEHOLDER, " ".join(text.split())))
    ids: list[int] = []
    position = masks = 0
    while position < len(found):
        if found[position : position + len(sign)] != sign:
            ids.append(found[position])
            position += 1
            continue
        if ids and names[ids[-1]] == WORD_START:
            ids.pop()  # the space belongs to the token that is looked for
        ids.append(MASK)
        masks, position = masks + 1, position + len(sign)
    if masks != len(MASK_SIGNS.findall(text)):
        raise DataError("its masks cannot be told from unknown characters by this tokenizer: separate them by spaces")
    return ids
