"""Weights of the authors' fairseq checkpoints under our names and in our layout, and back.

Apart from the names three things differ: the rows of q and k within a head (theirs: position low, position high, clone
low, clone high; ours: position low, clone low, position high, clone high), q, k and v as three matrices (ours: one with
rows [H, 3, P]), and the position table of the transition head, whose first two rows they keep for padding. In their
vocabulary `<mask>` comes last; in ours it is id 4.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from exlm_dist.checkpoint.reader import (
    TOKENIZER_FOLDER,
    find_checkpoint,
    load_weights,
    read_config,
    read_state,
    step_of,
)
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.tokenizers.tokenizer import MASK
from exlm_dist.utils.errors import CheckpointError, ConfigError
from exlm_dist.utils.files import sync_path
from exlm_dist.utils.logs import get_logger
from exlm_dist.utils.outputs import check_space, check_writable, user_path

logger = get_logger(__name__)

#: Entry of the metadata of a file that `export_fairseq` writes; its value is JSON.
METADATA = "exlm_dist"
WITHOUT_PRIOR = (
    "warning: their code has no prior over jumps (model.jump_prior {}). Hidden states, and what is fine-tuned on them, "
    "are the same there; transitions, and with them the likelihood of masked tokens, are not. `exlm import fairseq` "
    "and `exlm export hf` keep the prior."
)
#: Their parameters with a row per token.
EMBEDDING = "encoder.sentence_encoder.embed_tokens.weight"
TIED_COPY = "encoder.lm_head.weight"
#: Rows of their position table before the one of the first state: padding_idx + 1.
POSITION_OFFSET = 2
_QUARTERS = [0, 2, 1, 3]  # its own inverse
_MODULES = {
    "embedding": "encoder.sentence_encoder.embed_tokens",
    "norm": "encoder.sentence_encoder.emb_layer_norm_after",
    "output": "encoder.lm_head",
    "output.dense": "encoder.lm_head.dense",
    "output.norm": "encoder.lm_head.layer_norm",
    "output.transition.positions": "encoder.link_positional",
    "output.transition.query": "encoder.query_linear",
    "output.transition.key": "encoder.key_linear",
    "output.transition.gate": "encoder.gate_linear",
}
_BLOCK_MODULES = {
    "attention_norm": "self_attn_layer_norm",
    "attention.out": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "ffn.up": "fc1",
    "ffn.down": "fc2",
}
_LAYER = re.compile(r"encoder\.sentence_encoder\.layers\.(\d+)\.(.+)$")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)$")
_PROJECTION = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)$")
#: Entries of a fairseq state dict that are not weights of the pretrained model.
_IGNORED = re.compile(r"(classification_heads\..*|.*\.inv_freq|.*\.version|.*\._float_tensor)$")


def from_fairseq(
    state: Mapping[str, Tensor], *, heads: int | None = None, mask_last: bool = False
) -> dict[str, Tensor]:
    """Our parameters by canonical name from their state dict.

    heads: attention heads; by default those of the transition head. mask_last: move `<mask>` from the last id to ours.
    A token head that equals the embedding is taken to be tied. CheckpointError naming entries that are unknown.
    """
    heads = heads or _heads(state, "encoder.gate_linear.bias")
    projections: dict[tuple[str, str], dict[str, Tensor]] = {}
    weights: dict[str, Tensor] = {}
    unknown = []
    for name, value in state.items():
        layer = _LAYER.match(name)
        if layer and (projection := _PROJECTION.match(layer[2])):
            projections.setdefault((layer[1], projection[2]), {})[projection[1]] = value
        elif (ours := _our_name(name)) is not None:
            weights[ours] = value
        elif _IGNORED.match(name):
            logger.info("left out, not a weight of the pretrained model: %s", name)
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"unknown entries in the fairseq state dict: {', '.join(sorted(unknown))}. Is it an ExLM checkpoint?"
        )
    for (layer_index, kind), parts in projections.items():
        if missing := {"q", "k", "v"} - parts.keys():
            names = ", ".join(f"{letter}_proj.{kind}" for letter in sorted(missing))
            raise CheckpointError(f"the fairseq state dict has no {names} of layer {layer_index}. Is it whole?")
        weights[f"blocks.{layer_index}.attention.qkv.{kind}"] = _join(parts, heads)
    if "output.transition.positions.weight" in weights:
        weights["output.transition.positions.weight"] = weights["output.transition.positions.weight"][POSITION_OFFSET:]
    if "output.weight" in weights and torch.equal(weights["output.weight"], weights["embedding.weight"]):
        del weights["output.weight"]
    if mask_last:
        _move_vocabulary(weights, source=-1, target=MASK)
    return {name: value.contiguous() for name, value in weights.items()}


def to_fairseq(
    weights: Mapping[str, Tensor], *, heads: int | None = None, mask_last: bool = False
) -> dict[str, Tensor]:
    """Their state dict from our parameters: the inverse of `from_fairseq`.

    The two padding rows of the position table, which nothing reads, come back as zeros; a tied token head is listed
    under both names, as their model expects.
    """
    heads = heads or _heads(weights, "output.transition.gate.bias")
    weights = dict(weights)
    if mask_last:
        _move_vocabulary(weights, source=MASK, target=-1)
    state: dict[str, Tensor] = {}
    for name, value in weights.items():
        block = _BLOCK.match(name)
        if block and block[2].startswith("attention.qkv."):
            kind = block[2].rsplit(".", 1)[1]
            for letter, part in _split(value, heads).items():
                state[f"encoder.sentence_encoder.layers.{block[1]}.self_attn.{letter}_proj.{kind}"] = part
        else:
            state[_their_name(name)] = value
    if "encoder.link_positional.weight" in state:
        table = state["encoder.link_positional.weight"]
        state["encoder.link_positional.weight"] = torch.cat([table.new_zeros(POSITION_OFFSET, table.shape[1]), table])
    state.setdefault(TIED_COPY, state[EMBEDDING].clone())
    return {name: value.contiguous() for name, value in state.items()}


def export_fairseq(checkpoint: Path, out: Path) -> str:
    """Write the weights of a checkpoint (or of a run's newest) for the authors' code to `out`; a line that says so.

    Its metadata say what `exlm import fairseq` needs to make a checkpoint of it again, the prior over jumps among it,
    which their code has not: the line says so. An earlier export at `out` is replaced. ConfigError if `out` is anything
    else; OutputError if it cannot be written; CheckpointError if the checkpoint is not whole.
    """
    out = Path(os.path.realpath(user_path(out)))
    _check_target(out)
    folder = find_checkpoint(user_path(checkpoint))
    config, about = read_config(folder), read_state(folder)
    state = to_fairseq(load_weights(folder, verified=True), heads=config.model.heads, mask_last=True)
    check_space(out, sum(value.nbytes for value in state.values()), "the export")
    metadata = {
        "name": config.name,
        "step": step_of(folder),
        "model": config.model.model_dump(mode="json"),
        "tokenizer_fingerprint": load_tokenizer(folder / TOKENIZER_FOLDER).fingerprint,
        "data_fingerprint": about.get("data_fingerprint"),
    }
    try:
        _write(out, state, metadata)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--out {out} cannot be written: {error}.") from error
    done = f"{out}: {len(state)} tensors of {folder} in the layout of the authors' code (<mask> is the last id)"
    return done if config.model.jump_prior == "none" else f"{done}\n{WITHOUT_PRIOR.format(config.model.jump_prior)}"


def _write(out: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write the file beside `out`, then rename it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        new = Path(scratch, out.name)
        # One entry: safetensors writes several in any order.
        save_file(state, new, metadata={METADATA: json.dumps(metadata, sort_keys=True)})
        new.chmod(0o644)
        sync_path(new)
        _check_target(out)
        os.replace(new, out)
    sync_path(out.parent)


def read_metadata(path: Path) -> dict[str, Any] | None:
    """What `export_fairseq` says in a file of the model; None for any other file."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})[METADATA])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _check_target(out: Path) -> None:
    check_writable(out)
    if out.exists() and read_metadata(out) is None:
        raise ConfigError(
            f"--out {out} exists and is no earlier output of `exlm export fairseq`. Choose another, or remove it "
            "yourself."
        )


def _heads(tensors: Mapping[str, Tensor], gate: str) -> int:
    if gate not in tensors:
        raise CheckpointError(f"no {gate} to tell the number of attention heads from; pass heads.")
    return len(tensors[gate])


def _our_name(name: str) -> str | None:
    """Canonical name of one of their entries (q, k and v apart); None for an unknown one."""
    layer = _LAYER.match(name)
    module, _, kind = (layer[2] if layer else name).rpartition(".")
    for ours, theirs in (_BLOCK_MODULES if layer else _MODULES).items():
        if module == theirs:
            return f"blocks.{layer[1]}.{ours}.{kind}" if layer else f"{ours}.{kind}"
    return None


def _their_name(name: str) -> str:
    block = _BLOCK.match(name)
    module, _, kind = (block[2] if block else name).rpartition(".")
    known = _BLOCK_MODULES if block else _MODULES
    if module not in known:
        raise CheckpointError(f"{name} is no parameter of an ExLM model.")
    prefix = f"encoder.sentence_encoder.layers.{block[1]}." if block else ""
    return f"{prefix}{known[module]}.{kind}"


def _swap_quarters(rows: Tensor, heads: int) -> Tensor:
    """Swap the middle quarters of the rows of every head of q or k [D, ...]."""
    return rows.unflatten(0, (heads, 4, -1))[:, _QUARTERS].flatten(0, 2)


def _join(parts: Mapping[str, Tensor], heads: int) -> Tensor:
    """q, k and v [D, ...] as one tensor with rows [H, 3, P]."""
    swapped = (_swap_quarters(parts["q"], heads), _swap_quarters(parts["k"], heads), parts["v"])
    return torch.stack([part.unflatten(0, (heads, -1)) for part in swapped], dim=1).flatten(0, 2)


def _split(joined: Tensor, heads: int) -> dict[str, Tensor]:
    """The inverse of `_join`."""
    q, k, v = (part.flatten(0, 1) for part in joined.unflatten(0, (heads, 3, -1)).unbind(1))
    return {"q": _swap_quarters(q, heads), "k": _swap_quarters(k, heads), "v": v}


def _move_vocabulary(weights: dict[str, Tensor], *, source: int, target: int) -> None:
    """Move the row of `<mask>` from id `source` to `target` (-1: last) in each parameter that has a row per token."""
    for name in ("embedding.weight", "output.weight", "output.bias"):
        if name not in weights:
            continue
        order = list(range(len(weights[name])))
        order.insert(target if target >= 0 else len(order) - 1, order.pop(source))
        weights[name] = weights[name][order]
