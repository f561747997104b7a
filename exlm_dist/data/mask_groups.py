"""Which tokens of a sequence are masked as a whole: words, atoms, rings, and spans of them.

A group is a set of tokens of one sequence, named by a number below its length. It is a function of the tokens, and for
spans also of the key of the sample; `masking.choose_masked` draws groups where it otherwise draws single tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from exlm_dist.config.schema import MaskingConfig
from exlm_dist.data.counter_rng import PURPOSE_SPAN, hash_of, uniform, words_at
from exlm_dist.tokenizers.tokenizer import NUM_SPECIAL, Tokenizer
from exlm_dist.utils.errors import ConfigError

WORD_START = "\u2581"  # of sentencepiece
DOMAINS = {"word": "text", "atom": "smiles", "ring": "smiles"}
BONDS = frozenset(["-", "=", "#", "$", ":", "/", "\\", "~", "->", "<-"])
#: Kinds of SMILES tokens.
OTHER, ATOM, BOND, CLOSURE, OPEN, CLOSE, DOT = range(7)


@dataclass(frozen=True)
class Grouping:
    """How tokens are grouped. `table` [vocab_size]: bool, which ids start a word; or int8, the kind of each SMILES
    token; None for single tokens, and where nothing is going to be masked."""

    unit: str  # token, word, atom or ring
    span_p: float  # spans of units, with lengths geometric in p; 0: single units
    longest_span: int
    table: np.ndarray | None = None

    @classmethod
    def of(cls, masking: MaskingConfig, tokenizer: Tokenizer | None) -> Grouping | None:
        """The grouping of training, None if tokens are masked one by one. ConfigError for a unit that the domain of the
        tokenizer lacks. Without a tokenizer nothing can be masked with it."""
        if masking.unit == "token" and not masking.span_p:
            return None
        table = None
        if tokenizer is not None and masking.unit != "token":
            if tokenizer.domain != (needed := DOMAINS[masking.unit]):
                fits = " or ".join(unit for unit, domain in DOMAINS.items() if domain == tokenizer.domain)
                raise ConfigError(
                    f"masking.unit {masking.unit} is for data of the domain {needed}, and this is {tokenizer.domain}. "
                    f"Set masking.unit token or {fits}."
                )
            tokens = tokenizer.tokens()
            table = word_starts(tokens) if masking.unit == "word" else smiles_kinds(tokens)
        return cls(masking.unit, masking.span_p, masking.longest_span, table)

    def groups(self, tokens: np.ndarray, lengths: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """int64[sum]: group of each token, a number below the length of its sequence.

        `tokens` int[sum], `lengths` int64[B], `keys` uint64[B] from `masking.sample_keys`.
        """
        units = self._units(tokens, lengths)
        return units if not self.span_p else _spans(units, lengths, keys, self.span_p, self.longest_span)

    def _units(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        starts = np.cumsum(lengths) - lengths
        if self.unit == "token":
            return np.arange(len(tokens)) - np.repeat(starts, lengths)
        if self.table is None:
            raise ValueError(f"units of {self.unit}s need the tokenizer")
        if self.unit == "word":
            return _numbered(self.table[tokens], lengths)
        kinds = self.table[tokens]
        units = _numbered(_starts_atom(kinds, lengths), lengths)
        if self.unit == "ring":
            for start, length in zip(starts.tolist(), lengths.tolist()):
                one = slice(start, start + length)
                units[one] = ring_units(kinds[one].tolist(), tokens[one].tolist(), units[one])
        return units


def word_starts(tokens: Sequence[str]) -> np.ndarray:
    """bool[V]: which entries of a sentencepiece vocabulary start a word, that is, follow a space."""
    return np.array([token.startswith(WORD_START) for token in tokens])


def smiles_kinds(tokens: Sequence[str]) -> np.ndarray:
    """int8[V]: the kind of each entry of a SMILES vocabulary, by the OpenSMILES grammar; special tokens are OTHER."""
    return np.array([OTHER] * NUM_SPECIAL + [_kind(token) for token in tokens[NUM_SPECIAL:]], np.int8)


def ring_units(kinds: Sequence[int], tokens: Sequence[int], units: np.ndarray) -> np.ndarray:
    """int64[L]: `units` (int64[L], the atom that each token belongs to) with the atoms of a ring made one unit.

    A ring closure joins two atoms of the tree that SMILES writes; with the path between them they are a ring. An atom
    of several rings belongs to the one that closes first, so that of fused rings the later ones lack shared atoms. This
    is a function of the tokens alone: prepared data needs no more than these, and a ring is where it is written, not
    where a chemistry library of some version finds it. `kinds`, `tokens`: kind and id of each token.
    """
    parent: dict[int, int] = {}  # of each atom, the one before it in the tree; atoms are named by their unit
    ring: dict[int, int] = {}
    opened: dict[int, int] = {}
    branches: list[int] = []
    last = -1
    for kind, token, unit in zip(kinds, tokens, units.tolist()):
        if kind == ATOM:
            parent[unit], last = last, unit
        elif kind == OPEN:
            branches.append(last)
        elif kind == CLOSE and branches:
            last = branches.pop()
        elif kind == DOT:
            last = -1
        elif kind == CLOSURE and token in opened:
            new = [atom for atom in _path(opened.pop(token), last, parent) if atom not in ring]
            ring |= dict.fromkeys(new, min(new, default=-1))
        elif kind == CLOSURE:
            opened[token] = last
    return np.array([ring.get(unit, unit) for unit in units.tolist()], np.int64)


def _path(first: int, second: int, parent: dict[int, int]) -> set[int]:
    """Atoms from `first` to `second` along the tree, both included; none if they are of two molecules."""
    path = set()
    while first != second:  # an atom stands after its parent, so that the later of the two cannot be the common one
        later = max(first, second)
        path.add(later)
        first, second = min(first, second), parent.get(later, -1)
    return path | {first} if first >= 0 else set()


def _kind(token: str) -> int:
    if token in BONDS:
        return BOND
    if token.isdigit() or token.startswith("%"):
        return CLOSURE
    if token.startswith("[") or token.isalpha() or token == "*":
        return ATOM
    return {"(": OPEN, ")": CLOSE, ".": DOT}.get(token, OTHER)


def _starts_atom(kinds: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """bool[sum]: where an atom with what belongs to it starts: the bond before it, and its ring closures with theirs.

    Every other token is a unit of its own.
    """
    ends = np.cumsum(lengths)
    before, after = np.roll(kinds, 1), np.roll(kinds, -1)
    before[ends - lengths], after[ends - 1] = OTHER, OTHER
    joins = (kinds == CLOSURE) | ((kinds == BOND) & (after == CLOSURE)) | ((kinds == ATOM) & (before == BOND))
    return ~joins


def _numbered(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64[sum]: number of the unit of each token in its sequence; a sequence starts one. `starts` bool[sum]."""
    first = np.cumsum(lengths) - lengths
    begins = starts.copy()
    begins[first] = True
    numbers = np.cumsum(begins)
    return numbers - np.repeat(numbers[first], lengths)


def _spans(units: np.ndarray, lengths: np.ndarray, keys: np.ndarray, p: float, longest: int) -> np.ndarray:
    """int64[sum]: number of the span of each token. Each sequence is cut into spans of 1 to `longest` units, their
    lengths geometric in p (Joshi et al., SpanBERT, TACL 2020: p 0.2, at most 10, mean 3.8).
    """
    most = int(units.max()) + 1
    sizes = np.arange(1, longest + 1)
    below = (1 - (1 - p) ** sizes) / (1 - (1 - p) ** longest)  # probability of at most as many units
    draws = uniform(words_at(hash_of(PURPOSE_SPAN, keys)[:, None], np.arange(most)))
    ends = np.cumsum(1 + np.searchsorted(below[:-1], draws, side="right"), axis=1)
    begins = np.zeros((len(lengths), most), np.int64)
    rows, columns = np.nonzero(ends < most)
    begins[rows, ends[rows, columns]] = 1
    return np.cumsum(begins, axis=1)[np.repeat(np.arange(len(lengths)), lengths), units]
