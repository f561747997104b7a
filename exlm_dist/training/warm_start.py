"""A new run that starts with the weights of a checkpoint (setting `init`): which of them it can take, and how.

Parameters are matched by canonical name. Rows of the vocabulary are matched by their token, rows of the position table
by their index. What finds no match keeps its initial value. All of it is decided by names, shapes and tokens alone, so
that every layout starts with the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.checkpoint import hf_export, reader
from exlm_dist.checkpoint.pieces import Shape, Slice
from exlm_dist.checkpoint.tensors import TensorReader
from exlm_dist.config.schema import ModelConfig
from exlm_dist.model.initialisation import initial_value
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.utils.errors import CheckpointError, ConfigError
from exlm_dist.utils.files import sha256_file

#: Settings of `model` that decide what the weights of the blocks mean. All others may differ.
ARCHITECTURE = ("layers", "width", "heads", "ffn", "norm", "rotary")
EMBEDDING, TOKEN_HEAD, POSITIONS = "embedding.weight", "output.weight", "output.transition.positions.weight"
#: Settings of `model` by which the same weights compute something else in the states and their transitions.
OF_THE_STATES = ("states", "transitions", "transition_positions", "anchors", "jump_prior", "jump_width", "jump_floor")
#: Parameters with a row for each token.
VOCABULARY = (EMBEDDING, TOKEN_HEAD, "output.bias")
#: Names that a list gives before it says how many more there are.
NAMED = 8


@dataclass(frozen=True)
class Source:
    """A checkpoint whose weights are taken. `about`: its `path`, `sha256` and, if it is known, `step`; `tokens`: of
    each id."""

    about: dict[str, Any]
    model: ModelConfig
    tokens: list[str]
    tensors: TensorReader


@dataclass(frozen=True)
class Rows:
    """Row `into[i]` of a parameter is row `out_of[i]` of the source's parameter `name`."""

    name: str
    into: np.ndarray
    out_of: np.ndarray


@dataclass(frozen=True)
class Match:
    """What a run takes from a source, by the name of its parameter: all of a parameter (its name there), some rows, or
    nothing. `unused`: parameters of the source; `new_tokens`: those that the source does not have."""

    whole: dict[str, str]
    rows: dict[str, Rows]
    initialised: list[str]
    unused: list[str]
    new_tokens: list[str]


def candidates(init: str) -> list[Path]:
    """The folders that `init` may mean, best first: itself, or the checkpoints of a run. ConfigError if there are
    none."""
    path = Path(init)
    if path.is_file():
        raise ConfigError(
            f"init: {path} is a file. Import weights of the authors' code first: "
            f"exlm import fairseq {path} --tokenizer FOLDER --out FOLDER"
        )
    if not path.is_dir():
        raise ConfigError(f"init: there is no folder {path} (working folder {Path.cwd()}).")
    if hf_export.is_export(path) or reader.is_checkpoint(path):
        return [path]
    folders = reader.checkpoint_folders(path)
    if not folders:
        raise ConfigError(
            f"init: {path} has no checkpoint. Give a run folder (runs/NAME) with one, a checkpoint folder, or a folder "
            "that `exlm export hf` wrote."
        )
    return folders


def identify(folder: Path) -> dict[str, Any]:
    """What a run notes of its source: `path`, `sha256` of the weights, `step` (None for an export)."""
    about = {"path": str(folder.resolve()), "step": None}
    if hf_export.is_export(folder):
        return {**about, "sha256": sha256_file(folder / hf_export.WEIGHTS)}
    return {**about, "sha256": reader.reference(folder)["checkpoint.sha256"], "step": reader.step_of(folder)}


def open_source(folder: Path, about: dict[str, Any]) -> Source:
    """Open a checkpoint that was verified, or an export for transformers; nothing of the weights is read yet."""
    if hf_export.is_export(folder):
        model, tokens = hf_export.read_model(folder), hf_export.read_tokens(folder)
        tensors: TensorReader = hf_export.open_weights(folder)
    else:
        model, tokens = reader.read_config(folder).model, load_tokenizer(folder / reader.TOKENIZER_FOLDER).tokens()
        tensors = TensorReader(folder)
    rows = tensors.index.shapes.get(EMBEDDING, (0,))[0]
    if rows != len(tokens):
        raise CheckpointError(f"{folder}: the embedding has {rows} rows, but its tokenizer {len(tokens)} tokens.")
    return Source(about, model, tokens, tensors)


def check_architecture(source: Source, model: ModelConfig) -> None:
    """ConfigError, with the settings that work, if the blocks of the source do not fit `model`."""
    pairs = [(key, getattr(source.model, key), getattr(model, key)) for key in ARCHITECTURE]
    different = [(f"model.{key}", theirs, ours) for key, theirs, ours in pairs if theirs != ours]
    if different:
        lines = [f"  {key} is {theirs} there, {ours} here" for key, theirs, ours in different]
        settings = " ".join(f"--{key} {theirs}" for key, theirs, _ in different)
        raise ConfigError(
            f"init: the weights in {source.about['path']} are of another architecture:\n"
            + "\n".join(lines)
            + f"\nTo start from them: {settings}"
        )


def other_states(source: Source, model: ModelConfig) -> list[str]:
    """Settings of states and transitions that the source has otherwise, in words; none if either is a plain model."""
    if "mlm" in (source.model.objective, model.objective):
        return []
    pairs = [(key, getattr(source.model, key), getattr(model, key)) for key in OF_THE_STATES]
    return [f"model.{key} is {ours} here, {theirs} there" for key, theirs, ours in pairs if theirs != ours]


def match_parameters(
    ours: Mapping[str, Shape], theirs: Mapping[str, Shape], our_tokens: Sequence[str], their_tokens: Sequence[str]
) -> Match:
    """What parameters of the shapes `ours` take from a source with `theirs`. An untied token head takes the embedding
    of a source where the two are tied."""
    into, out_of = _common_tokens(our_tokens, their_tokens)
    known = set(their_tokens)
    match = Match({}, {}, [], [], [token for token in our_tokens if token not in known])
    for name, shape in ours.items():
        origin = EMBEDDING if name == TOKEN_HEAD and name not in theirs else name
        other = theirs.get(origin)
        if other is not None and name in VOCABULARY and list(our_tokens) != list(their_tokens):
            match.rows[name] = Rows(origin, np.array(into), np.array(out_of))
        elif other == shape:
            match.whole[name] = origin
        elif other is not None and name == POSITIONS:
            common = np.arange(min(shape[0], other[0]))
            match.rows[name] = Rows(origin, common, common)
        else:
            match.initialised.append(name)
    used = {*match.whole.values(), *(rows.name for rows in match.rows.values()), *match.initialised}
    match.unused.extend(name for name in theirs if name not in used)
    return match


def _common_tokens(ours: Sequence[str], theirs: Sequence[str]) -> tuple[list[int], list[int]]:
    """Ids (here, there) of the tokens that both have."""
    there: dict[str, int] = {}
    for number, token in enumerate(theirs):
        there.setdefault(token, number)
    pairs = [(number, there[token]) for number, token in enumerate(ours) if token in there]
    return [here for here, _ in pairs], [other for _, other in pairs]


class InitialWeights:
    """The parameters that take something from a source, read like those of a checkpoint."""

    def __init__(self, source: Source, match: Match, shapes: Mapping[str, Shape], *, seed: int, std: float) -> None:
        """`shapes` of all parameters; `seed`, `std`: of their initial values."""
        self._tensors, self._match, self._shapes = source.tensors, match, shapes
        self._seed, self._std = seed, std

    @property
    def names(self) -> set[str]:
        """Canonical names of what there is to read."""
        return {*self._match.whole, *self._match.rows}

    def read(self, name: str, moment: str | None, part: Slice | None, start: int, stop: int) -> np.ndarray:
        """As `TensorReader.read`; there are no moments."""
        assert moment is None
        if name in self._match.whole:
            return self._tensors.read(self._match.whole[name], None, part, start, stop)
        value = initial_value(name, self._shapes[name], seed=self._seed, std=self._std).numpy()
        rows = self._match.rows[name]
        value[rows.into] = self._tensors.whole(rows.name, None)[rows.out_of]
        if part is not None:
            value = value.take(range(part.start, part.stop), axis=part.dim)
        return value.reshape(-1)[start:stop]


def summary(match: Match, shapes: Mapping[str, Shape], otherwise: Sequence[str]) -> dict[str, Any]:
    """`taken` whole, in part and not, and settings that are otherwise (`other_states`), as `state.json` has it beside
    what `identify` says."""
    return {
        "taken": len(match.whole),
        "taken_in_part": {name: f"{len(rows.into)} of {shapes[name][0]} rows" for name, rows in match.rows.items()},
        "initialised": match.initialised,
        "unused": match.unused,
        "new_tokens": len(match.new_tokens) if EMBEDDING in match.rows else 0,
        "otherwise": list(otherwise),
    }


def table(init: Mapping[str, Any], new_tokens: Sequence[str]) -> str:
    """What was taken and what not, for people. `init`: as in `state.json`."""
    rows = [
        ("weights of", f"{init['path']} (sha256 {init['sha256'][:12]})"),
        ("taken", f"{init['taken']} parameters"),
        ("taken in part", ", ".join(f"{name}: {rows}" for name, rows in init["taken_in_part"].items())),
        ("new tokens", f"{init['new_tokens']}: {_listed(new_tokens)}" if init["new_tokens"] else ""),
        ("initialised", _listed(init["initialised"])),
        ("not used", _listed(init["unused"])),
        ("otherwise", ", ".join(init["otherwise"])),
    ]
    return "\n".join(f"  {key:<15}{value}" for key, value in rows if value)


def tags(init: Mapping[str, Any] | None) -> dict[str, str]:
    """How a run that took weights says so in its event log and MLflow."""
    if init is None:
        return {}
    values = {key: init[key] for key in ("path", "sha256", "step", "taken", "new_tokens")}
    values["taken_in_part"] = ", ".join(init["taken_in_part"]) or "none"
    values |= {key: _listed(init[key]) or "none" for key in ("initialised", "unused")}
    return {f"init.{key}": str(value) for key, value in values.items()}


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
