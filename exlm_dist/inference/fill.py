"""What stands at the masks of a text or a molecule: completions of all masks at once, with their probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from exlm_dist.config.schema import ModelConfig
from exlm_dist.data.batch import PackedBatch
from exlm_dist.data.expansion import Expanded, expand, expanded_lengths, wrap
from exlm_dist.data.masking import Masks
from exlm_dist.data.packing import pack
from exlm_dist.inference.completions import Scored, StateChain
from exlm_dist.inference.loading import LoadedCheckpoint
from exlm_dist.inference.side_by_side import on_cores
from exlm_dist.model.build import LanguageModel, run_layers
from exlm_dist.model.heads import Output
from exlm_dist.model.stream import Stream
from exlm_dist.tokenizers import Tokenizer
from exlm_dist.tokenizers.masked_text import encode_masked
from exlm_dist.tokenizers.tokenizer import MASK, NUM_SPECIAL
from exlm_dist.utils.errors import ConfigError, DataError

#: Prefixes that the search keeps by default, and tokens that are named for each mask.
BEAM, LIKELY = 64, 5
#: Expanded tokens of a micro-batch, by the type of the device, and the most logits of all those at work.
BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
BATCH_LOGITS = 1 << 26


@dataclass(frozen=True)
class Completion:
    """A filled text; the logarithm of the probability of all its tokens jointly, given the rest. For molecules: whether
    RDKit can read it, and its canonical form."""

    text: str
    tokens: list[str]
    log_probability: float
    valid: bool | None = None
    canonical: str | None = None

    @property
    def probability(self) -> float:
        """That of all the tokens jointly; 0 below the range of floats."""
        return math.exp(self.log_probability)


@dataclass(frozen=True)
class Filled:
    """Completions of `text`, best first or as drawn. marginals: for each mask its most probable tokens, each by
    itself; `independent`: the completion by the first of these, with its joint probability."""

    text: str
    completions: list[Completion]
    marginals: list[list[tuple[str, float]]]
    independent: Completion


@dataclass(frozen=True)
class FillSettings:
    """How completions are chosen: the `top` most probable ones by a search that keeps `beam` prefixes, or (`sample` >
    0) so many draws at `temperature`; those of a text depend on `seed` and its index alone. ConfigError for values out
    of range."""

    top: int = 5
    beam: int = BEAM
    sample: int = 0
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("top", 1), ("beam", 1), ("sample", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be at least {least}.")
        if not self.temperature > 0:
            raise ConfigError(f"temperature = {self.temperature}: must be above 0.")


def fill_text(loaded: LoadedCheckpoint, text: str, settings: FillSettings = FillSettings()) -> Filled:
    """Fill the masks (`<mask>` or `[MASK]`) of one text. DataError, with the reason, if that cannot be done."""
    (result,) = fill_texts(loaded, [text], settings)
    if isinstance(result, str):
        raise DataError(f"{text!r}: {result}.")
    return result


def fill_texts(
    loaded: LoadedCheckpoint, texts: Sequence[str | None], settings: FillSettings = FillSettings(), *, first: int = 0
) -> list[Filled | str]:
    """Fill the masks of each text, in order; the reason instead for a text that cannot be filled. `first`: index of the
    first text, where they are a part of more."""
    rows: list[np.ndarray] = []
    results: list[Filled | str] = ["" for _ in texts]
    chosen = []
    for index, text in enumerate(texts):
        try:
            rows.append(_encoded(loaded, text))
            chosen.append(index)
        except DataError as error:
            results[index] = str(error)
    for index, ids, chain in zip(chosen, rows, state_chains(loaded, rows)):
        random = np.random.default_rng((settings.seed, first + index))
        results[index] = _filled(loaded.tokenizer, str(texts[index]), ids, chain, settings, random)
    return results


def state_chains(loaded: LoadedCheckpoint, rows: Sequence[np.ndarray]) -> Iterator[StateChain]:
    """The joint distribution at the masks of each sequence of ids (with MASK, without BOS and EOS), in order."""
    model = loaded.config.model
    sizes = [_expanded_length(row, model) for row in rows]
    at_work = torch.get_num_threads() if loaded.device.type == "cpu" else 1
    room = min(BATCH_TOKENS[loaded.device.type], BATCH_LOGITS // (at_work * loaded.tokenizer.vocab_size))

    def micro_batches() -> Iterator[Sequence[np.ndarray]]:
        first = 0
        while first < len(rows):
            last, total = first + 1, sizes[first]
            while last < len(rows) and total + sizes[last] <= room:
                total, last = total + sizes[last], last + 1
            yield rows[first:last]
            first = last

    for chains in on_cores(lambda some: list(_chains(loaded, some)), micro_batches(), loaded.device):
        yield from chains


def _chains(loaded: LoadedCheckpoint, rows: Sequence[np.ndarray]) -> Iterator[StateChain]:
    settings = loaded.config.model
    nobody = np.full(len(rows), -1)
    batch = pack(
        _expanded(rows, settings.states, settings.anchors),
        0,
        len(rows),
        states=settings.states,
        bucket=1,
        sample_ids=nobody,
        epochs=nobody,
        step=0,
        index=0,
    )
    return batch_chains(loaded.model, batch, loaded.device, first=NUM_SPECIAL)


def batch_chains(model: LanguageModel, batch: PackedBatch, device: torch.device, *, first: int) -> Iterator[StateChain]:
    """The joint distribution at the masks of each sequence of a packed batch, in order, over the tokens from `first` on
    (NUM_SPECIAL: the ordinary ones)."""
    output = model.output
    assert output is not None  # a whole model has all its layers
    with torch.inference_mode():
        stream = run_layers(model.layers[:-1], Stream.from_batch(batch, device), recompute=False)
        yield from stream_chains(output, stream, batch, first=first)


def stream_chains(output: Output, stream: Stream, batch: PackedBatch, *, first: int) -> Iterator[StateChain]:
    """`batch_chains` of a batch that has passed all layers before the output as `stream`."""
    log_tokens, transitions = output.distributions(stream)
    for row in range(batch.num_sequences):
        targets, states = slice(*batch.cu_targets[row : row + 2]), slice(*batch.cu_states[row : row + 2])
        count = states.stop - states.start
        edges = None if transitions is None else transitions[row, :count, :count].float().cpu().numpy()
        yield StateChain(log_tokens[states].cpu().numpy(), edges, batch.is_masked[targets], output.ends, first)


def _expanded(rows: Sequence[np.ndarray], states: int, anchors: bool) -> Expanded:
    tokens = np.concatenate(rows)
    indices = np.flatnonzero(tokens == MASK)
    counts = np.array([(row == MASK).sum() for row in rows])
    masks = Masks(indices, counts, np.full(len(indices), MASK))
    return expand(wrap(tokens, np.array([len(row) for row in rows]), masks, anchors), states)


def _encoded(loaded: LoadedCheckpoint, text: str | None) -> np.ndarray:
    if text is None or not text.strip():
        raise DataError("empty")
    ids = np.array(encode_masked(loaded.tokenizer, text), np.int64)
    size, most = _expanded_length(ids, loaded.config.model), loaded.config.model.max_positions
    if size > most:
        raise DataError(f"{size} positions with its masks expanded, but the model takes {most} at most")
    return ids


def _expanded_length(ids: np.ndarray, model: ModelConfig) -> int:
    lengths, counts = np.array([len(ids)]), np.array([(ids == MASK).sum()])
    return int(expanded_lengths(lengths, counts, model.states, model.anchors)[0])


def _filled(
    tokenizer: Tokenizer,
    text: str,
    ids: np.ndarray,
    chain: StateChain,
    settings: FillSettings,
    random: np.random.Generator,
) -> Filled:
    if settings.sample:
        scored = chain.sample(settings.sample, settings.temperature, random)
    else:
        scored = chain.best(settings.top, settings.beam)
    marginals, names = chain.marginals(), tokenizer.tokens()
    likely = np.argsort(-marginals, axis=1, kind="stable")[:, :LIKELY]
    single = tuple(likely[:, 0].tolist())
    return Filled(
        text,
        [_completion(tokenizer, ids, one) for one in scored],
        [[(names[i], float(row[i])) for i in best] for row, best in zip(marginals, likely)],
        _completion(tokenizer, ids, Scored(single, chain.log_probability(single))),
    )


def _completion(tokenizer: Tokenizer, ids: np.ndarray, scored: Scored) -> Completion:
    names, filled = tokenizer.tokens(), ids.copy()
    filled[ids == MASK] = scored.tokens
    text = tokenizer.decode(filled.tolist())
    tokens = [names[token] for token in scored.tokens]
    canonical = canonical_form(tokenizer, text)
    valid = canonical is not None if tokenizer.domain == "smiles" else None
    return Completion(text, tokens, scored.log_probability, valid, canonical)


def canonical_form(tokenizer: Tokenizer, text: str) -> str | None:
    """Canonical SMILES under the tokenizer's policy; None if RDKit cannot read it, and for text."""
    from exlm_dist.tokenizers.smiles_tokenizer import SmilesTokenizer

    if not isinstance(tokenizer, SmilesTokenizer):
        return None
    from exlm_dist.tokenizers.molecules import MoleculeError, canonical_smiles

    try:
        return canonical_smiles(text, tokenizer.policy)
    except MoleculeError:
        return None
