"""`exlm import fairseq`: weights in the layout of the authors' code become a checkpoint; the inverse of
`exlm export fairseq`. Only safetensors files are read: fairseq's own are pickles, which may run any code."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from exlm_dist.checkpoint.weights_only import FAIRSEQ, check_target, write_weights
from exlm_dist.config import RunConfig, check_config, dump_config
from exlm_dist.config.load import read_yaml, validate
from exlm_dist.config.schema import ModelConfig
from exlm_dist.export.fairseq import EMBEDDING, POSITION_OFFSET, TIED_COPY, from_fairseq, read_metadata
from exlm_dist.model.build import LanguageModel
from exlm_dist.tokenizers import Tokenizer, load_tokenizer
from exlm_dist.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from exlm_dist.tokenizers.tokenizer import NUM_SPECIAL, UNK
from exlm_dist.utils.errors import CheckpointError, ConfigError, DataError
from exlm_dist.utils.files import sha256_file
from exlm_dist.utils.logs import get_logger

logger = get_logger(__name__)

#: Ids that fairseq gives before those of the dictionary: <s>, <pad>, </s>, <unk>.
_FIRST_WORD = 4
_PER_TOKEN = (EMBEDDING, TIED_COPY, "encoder.lm_head.bias")
_LAYER = re.compile(r"encoder\.sentence_encoder\.layers\.(\d+)\.fc1\.weight$")
#: First bytes of what torch.save writes: a zip archive, and before that a bare pickle.
_PICKLES = (b"PK\x03\x04", b"\x80")
_CONVERT = """{path} was written by torch.save. It is a pickle, which may run any code when it is loaded: it is not \
loaded here. If you trust it, run where fairseq and safetensors are installed

import torch
from safetensors.torch import save_file
state = torch.load({path!r}, map_location="cpu", weights_only=False)["model"]
save_file({{name: value.float().clone().contiguous() for name, value in state.items()}}, {new!r})

(before torch 1.13 without weights_only), and import {new}."""


def import_fairseq(
    file: Path, out: Path, *, tokenizer: Path, config: Path | None = None, dictionary: Path | None = None
) -> str:
    """Write the weights in a safetensors file of the authors' layout as the checkpoint folder `out`; a line that says
    so. An earlier import at `out` is replaced.

    tokenizer: a folder with one (prepared data, a checkpoint), or a sentencepiece model file. config: YAML with a
    `model` section, for a file that does not say its model. dictionary: fairseq's dict.txt, where its order is not
    that of the tokenizer.

    Raises:
        ConfigError: `out` exists and is no earlier import; a pickle; settings that are missing, or not those of the
            weights. CheckpointError: no such weights in the file. DataError: another tokenizer or dictionary.
    """
    file, out = Path(file), Path(os.path.abspath(out))
    check_target(out, FAIRSEQ)
    state = _read_tensors(file)
    about = read_metadata(file)
    chosen = _load_tokenizer(Path(tokenizer), about)
    settings = _settings(file, about, config)
    note = ""
    if dictionary is not None:
        state, note = _in_tokenizer_order(state, Path(dictionary), chosen)
    elif about is None:
        logger.warning("the rows of %s are taken to be in the order of the tokenizer; else give --dictionary", file)
    _check_sizes(state, settings.model, chosen.vocab_size, file)
    weights = from_fairseq(state, heads=settings.model.heads, mask_last=True)
    _check_names(weights, settings.model, chosen.vocab_size, file)
    count = sum(value.numel() for value in weights.values())
    about = about or {"step": 0, "data_fingerprint": None}
    origin = {"kind": FAIRSEQ, "file": file.name, "sha256": sha256_file(file)}
    known = {"tokenizer_fingerprint": chosen.fingerprint, "parameters": count}
    if about["data_fingerprint"]:
        known["data_fingerprint"] = about["data_fingerprint"]
    with tempfile.TemporaryDirectory() as scratch:
        chosen.save(Path(scratch))
        write_weights(
            out,
            {name: value.numpy() for name, value in weights.items()},
            origin=origin,
            state={"step": about["step"], **known},
            config=dump_config(settings),
            tokenizer=Path(scratch),
        )
    return f"{out}: {count:,} parameters of {file}{note}, without moments: no run resumes from it"


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors by name, fp32."""
    if not file.is_file():
        raise ConfigError(f"{file} is no file. Give a safetensors file with weights of the authors' code.")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        with open(file, "rb") as handle:
            start = handle.read(4)
        if start.startswith(_PICKLES):
            raise ConfigError(_CONVERT.format(path=str(file), new=str(file.with_suffix(".safetensors")))) from None
        raise CheckpointError(f"{file} cannot be read as safetensors ({error}). Is it whole?") from error
    if EMBEDDING not in tensors:
        raise CheckpointError(f"{file} has no {EMBEDDING}: these are no weights of the authors' code.")
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def _load_tokenizer(path: Path, about: Mapping[str, Any] | None) -> Tokenizer:
    tokenizer = SentencePieceTokenizer.from_model_file(path) if path.is_file() else load_tokenizer(path)
    if about is not None and about["tokenizer_fingerprint"] != tokenizer.fingerprint:
        raise DataError(
            f"the weights were trained with tokenizer {about['tokenizer_fingerprint'][:12]}, and that of {path} is "
            f"{tokenizer.fingerprint[:12]}. Give --tokenizer the data or a checkpoint of that run."
        )
    return tokenizer


def _settings(file: Path, about: Mapping[str, Any] | None, config: Path | None) -> RunConfig:
    """Settings of the checkpoint: those of the model from the file itself or `config`; of the others what is known."""
    if about is None and config is None:
        raise ConfigError(
            f"{file} does not say what model it is of: give --config YAML with its `model` section "
            "(`exlm config schema model` explains each setting; states, norm, rotary and anchors show in no shape)."
        )
    if about is not None and config is not None:
        raise ConfigError(f"{file} says itself what model it is of. Leave out --config.")
    origins: dict[str, str] = {}
    if about is not None:
        model, name, step = about["model"], about["name"], about["step"]
    else:
        tree, origins = read_yaml(Path(str(config)))
        if "model" not in tree:
            raise ConfigError(f"{config} has no `model` section, which is to say what model {file} is of.")
        model, name, step = tree["model"], re.sub(r"[^A-Za-z0-9._-]|^[._-]+", "", file.stem) or "imported", 0
    tree = {
        "name": name,
        "data": {"path": "unknown data (imported weights; give --data)"},
        "schedule": {"steps": max(step, 1)},
        "model": {"jump_prior": "none", **model} if isinstance(model, dict) else model,
    }
    settings = validate(tree, origins, str(config or file))
    check_config(settings)
    if about is None and settings.model.jump_prior != "none":
        raise ConfigError(
            f"{origins['model.jump_prior']}: model.jump_prior {settings.model.jump_prior}, but the authors' "
            "code has no prior over jumps. Set it to none, or leave it out."
        )
    return settings


def _in_tokenizer_order(state: Mapping[str, Tensor], path: Path, tokenizer: Tokenizer) -> tuple[dict[str, Tensor], str]:
    """Their tensors with a row for each token of the tokenizer, in its order, `<mask>` last; and what is to be said.

    A token that the dictionary does not have gets the row of `<unk>`, as which fairseq would encode it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as fairseq's dictionary: {error}.") from error
    theirs = {line.rsplit(" ", 1)[0]: number for number, line in enumerate(lines, _FIRST_WORD)}
    rows = len(state[EMBEDDING])
    if _FIRST_WORD + len(lines) + 1 != rows:
        raise DataError(
            f"{path} has {len(lines)} entries, which with <s>, <pad>, </s>, <unk> and <mask> make {len(lines) + 5} "
            f"tokens; the weights have {rows}. Give the dictionary that they were trained with."
        )
    ours = tokenizer.tokens()[NUM_SPECIAL:]
    missing = [token for token in ours if token not in theirs]
    if 2 * len(missing) > len(ours):
        raise DataError(
            f"{path} lacks {len(missing)} of the {len(ours)} tokens of the tokenizer (first: {missing[0]!r}). Give "
            "--tokenizer the one that fairseq's data was made with."
        )
    order = torch.tensor([*range(_FIRST_WORD), *(theirs.get(token, UNK) for token in ours), rows - 1])
    left_out = len(theirs) - len(ours) + len(missing)
    note = f" ({len(missing)} tokens that its dictionary lacks are as <unk>; {left_out} of its tokens left out)"
    return {name: value[order] if name in _PER_TOKEN else value for name, value in state.items()}, note


def _check_sizes(state: Mapping[str, Tensor], model: ModelConfig, vocab_size: int, file: Path) -> None:
    """ConfigError naming each setting that the shapes contradict; DataError for another vocabulary."""
    layers = {int(found[1]) for name in state if (found := _LAYER.match(name))}
    sizes: dict[str, Any] = {"layers": len(layers), "width": state[EMBEDDING].shape[1]}
    if layers:
        sizes["ffn"] = len(state[f"encoder.sentence_encoder.layers.{min(layers)}.fc1.weight"])
    if "encoder.gate_linear.bias" in state:
        sizes["heads"] = len(state["encoder.gate_linear.bias"])
        sizes["transition_positions"] = "encoder.link_positional.weight" in state
    if "encoder.link_positional.weight" in state:
        sizes["max_positions"] = len(state["encoder.link_positional.weight"]) - POSITION_OFFSET
    sizes["tie_head"] = TIED_COPY not in state or torch.equal(state[TIED_COPY], state[EMBEDDING])
    wrong = [
        f"model.{key} is {json.dumps(size)} by the weights, not {json.dumps(getattr(model, key))}"
        for key, size in sizes.items()
        if getattr(model, key) != size
    ]
    if wrong:
        raise ConfigError(f"{file} is not of the model that its settings describe: {'; '.join(wrong)}.")
    if (rows := len(state[EMBEDDING])) != vocab_size:
        raise DataError(
            f"{file} has a row for each of {rows} tokens, but the tokenizer has {vocab_size}. Without --dictionary the "
            "rows must be those of the tokenizer in its order, with <mask> last."
        )


def _check_names(weights: Mapping[str, Tensor], model: ModelConfig, vocab_size: int, file: Path) -> None:
    """ConfigError naming the parameters that are missing, superfluous, or of another shape than the model's."""
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in LanguageModel(model, vocab_size).named_parameters()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if differing := sorted({name for name, _ in wanted.items() ^ found.items()}):
        first = differing[0]
        raise ConfigError(
            f"{file} is not of the model that its settings describe: {first} is {found.get(first, 'missing')} there "
            f"and {wanted.get(first, 'missing')} in the model ({len(differing)} differ). See model.objective, "
            "model.transitions and model.transition_positions."
        )
