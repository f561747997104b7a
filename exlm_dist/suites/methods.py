"""What is evaluated: checkpoints, and what a checkpoint has to be better than.

Besides run folders and checkpoints some names are understood: `random`, the initial weights of models of the same
shape, and those of the suite's baselines, which know no pretraining at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exlm_dist.checkpoint.reader import (
    TOKENIZER_FOLDER,
    find_checkpoint,
    read_config,
    read_state,
    reference,
    run_folder_of,
)
from exlm_dist.config import RunConfig, recipe_of
from exlm_dist.finetuning.model_folder import refuse_model
from exlm_dist.suites.catalogue import SUITES, UNSEEDED
from exlm_dist.suites.chemprop import find_chemprop
from exlm_dist.suites.moleculenet import CHEMPROP
from exlm_dist.suites.suite import Suite
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.utils.errors import ConfigError
from exlm_dist.utils.files import fingerprint_of

RANDOM = "random"
#: Settings of a model that its encoder does not depend on where nothing is masked.
_NOT_OF_THE_ENCODER = {
    "objective",
    "states",
    "transitions",
    "jump_prior",
    "jump_width",
    "jump_floor",
    "transition_positions",
    "anchors",
    "tie_head",
}


@dataclass(frozen=True)
class Method:
    """A column of the table.

    Args:
        kind: 'checkpoint', 'random' (its shape alone), or one of the kinds of a baseline.
        label: what the table calls it. key: the same as the name of a folder; no other method has it.
        checkpoint: the one whose weights, or whose shape, it has; None for a baseline.
        frozen: the encoder is not trained. probe: nor is a head: a linear model on the embeddings takes its place.
        facts: what is recorded of the checkpoint, of chemprop its program.
    """

    kind: str
    label: str
    key: str
    checkpoint: Path | None
    frozen: bool
    facts: dict[str, Any]
    probe: bool = False

    @property
    def trained(self) -> bool:
        """Whether it is trained as a protocol says: neither trees nor linear models are."""
        return self.checkpoint is not None and not self.probe

    @property
    def seeded(self) -> bool:
        """Whether its results depend on the seed."""
        return self.kind not in UNSEEDED and (not self.probe or self.kind == RANDOM)


def find_methods(
    names: Sequence[str],
    suite: Suite,
    *,
    frozen: bool = False,
    frozen_only: bool = False,
    embed_once: bool = False,
    pinned: Mapping[str, Path] | None = None,
    chemprop: Path | None = None,
) -> list[Method]:
    """The methods that the names of `--checkpoint` stand for, in their order; with `frozen` each checkpoint twice, the
    second time with the head alone trained, with `frozen_only` only so; with `embed_once` each as a linear probe on its
    embeddings instead. pinned: of checkpoints, where their files are meanwhile. chemprop: its program, where it is not
    on the PATH.

    CheckpointError for what is no whole checkpoint; ConfigError for one that reads what the suite does not have, for
    `random` without a checkpoint that has a shape, for the baseline of another suite, and for chemprop that is not
    installed.
    """
    baselines = [one for one in suite.baselines if one.name in names]
    given = [name for name in names if name not in (RANDOM, *(one.name for one in baselines))]
    for other in SUITES.values():
        for one in other.baselines:
            if one.name in given:
                raise ConfigError(f"{one.name} is a baseline of the suite {other.name}, not of {suite.name}.")
    if chemprop is not None and CHEMPROP not in names:
        raise ConfigError(f"--chemprop says where its program is: give {CHEMPROP} to --checkpoint too.")
    methods = find_checkpoints(given, pinned=pinned)
    for method in methods:
        _check_domain(method, suite)
    if RANDOM in names:
        methods += _random(methods)
    if frozen_only:
        methods = [_frozen(method) for method in methods]
    elif frozen:
        methods = [one for method in methods for one in (method, _frozen(method))]
    if embed_once:
        methods = [_probe(method) for method in methods]
    for one in baselines:
        facts = {"program": str(find_chemprop(chemprop))} if one.name == CHEMPROP else {}
        labels = {kind: one.label(kind) for kind in one.kinds}
        methods += [Method(kind, label, label.replace(", ", "-"), None, False, facts) for kind, label in labels.items()]
    if not methods:
        raise ConfigError("--checkpoint names nothing that can be evaluated.")
    return methods


def find_checkpoints(names: Sequence[str], *, pinned: Mapping[str, Path] | None = None) -> list[Method]:
    """The checkpoints that are named, each once. CheckpointError for what is no whole checkpoint."""
    found = [_checkpoint(Path(name), (pinned or {}).get(name)) for name in names]
    return list({method.key: method for method in found}.values())


def _checkpoint(path: Path, pinned: Path | None) -> Method:
    refuse_model(path)
    folder = find_checkpoint(path if pinned is None else pinned)
    place = folder if pinned is None else path
    config, origin = read_config(folder), reference(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    step, sha256 = int(origin["checkpoint.step"]), origin["checkpoint.sha256"]
    run = run_folder_of(place)
    facts = {
        "run": None if run is None else str(run),
        "path": str(place.resolve()),
        "step": step,
        "sha256": sha256,
        "objective": config.model.objective,
        "states": config.model.states,
        "budget": config.budget,
        "shape": _shape(config, tokenizer.fingerprint),
        "recipe": fingerprint_of([recipe_of(config), read_state(folder).get("data_fingerprint")]),
        "domain": tokenizer.domain,
        "tokenizer": tokenizer.fingerprint,
    }
    label = f"{config.name}@{step}"
    return Method("checkpoint", label, f"{_as_folder(label)}-{sha256[:8]}", folder, False, facts)


def _check_domain(method: Method, suite: Suite) -> None:
    if method.facts["domain"] != suite.domain:
        read, wanted = (_kind(domain) for domain in (method.facts["domain"], suite.domain))
        raise ConfigError(
            f"{method.checkpoint}: reads {read}, but the suite {suite.name} has {wanted}. Give another checkpoint."
        )


def _random(checkpoints: Sequence[Method]) -> list[Method]:
    """Initial weights, once for each distinct shape."""
    if not checkpoints:
        raise ConfigError(f"{RANDOM} stands for the initial weights of a model: give a checkpoint with its shape too.")
    shapes = {method.facts["shape"]: method for method in reversed(checkpoints)}
    found = []
    for method in checkpoints:
        if shapes.get(shape := method.facts["shape"]) is method:
            facts = {"shape": shape, "shape_of": method.label}
            label = "random" if len(shapes) == 1 else f"random like {method.label}"
            found.append(Method(RANDOM, label, f"random-{shape[:8]}", method.checkpoint, False, facts))
    return found


def _frozen(method: Method) -> Method:
    return replace(method, label=f"{method.label} frozen", key=f"{method.key}-frozen", frozen=True)


def _probe(method: Method) -> Method:
    return replace(method, label=f"{method.label} linear", key=f"{method.key}-linear", frozen=True, probe=True)


def _shape(config: RunConfig, tokenizer: str) -> str:
    """Equal for models whose initial encoders are the same."""
    model = config.model.model_dump(mode="json", exclude=_NOT_OF_THE_ENCODER)
    return fingerprint_of({"model": model, "tokenizer": tokenizer})


def _kind(domain: str) -> str:
    return "molecules" if domain == "smiles" else "texts"


def _as_folder(label: str) -> str:
    return "".join(character if character.isalnum() or character in "-_.@" else "_" for character in label)
