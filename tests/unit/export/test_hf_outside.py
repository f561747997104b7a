"""An export where torch and the transformers library are installed and this package is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
from hf_exports import LENGTHS, distribution, hidden_states, make_checkpoint, padded_inputs, plain_stream
from made_run import MOLECULES, make_data
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packed import make_batch

from exlm_dist.checkpoint.reader import read_config
from exlm_dist.export.hf.hf_folder import export_hf
from exlm_dist.inference.loading import load_model
from exlm_dist.model.stream import Stream
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.tokenizers.tokenizer import BOS, EOS, MASK, PAD


def test_an_environment_without_this_package(tmp_path):
    data = make_data(tmp_path / "data")
    checkpoint = make_checkpoint(tmp_path, data)
    export_hf(checkpoint, tmp_path / "exported")
    store_what_our_model_says(load_model(checkpoint, read_config(checkpoint), load_tokenizer(data)), data, tmp_path)
    packages = tmp_path / "packages"
    link_packages(packages, "transformers", "accelerate", "torch")
    assert not list(packages.glob("*exlm*"))
    for name in ("modules", "trained"):
        (tmp_path / name).mkdir()
    script = Path(__file__).with_name("outside_the_package.py")
    arguments = [packages, tmp_path / "exported", tmp_path, tmp_path / "trained"]
    done = subprocess.run(
        [sys.executable, "-I", "-S", script, *arguments],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def store_what_our_model_says(model, data: Path, folder: Path) -> None:
    """`texts.json`, and their hidden states, those of random expanded sequences, and the distributions at the masks."""
    from safetensors.torch import save_file

    tokenizer, batch = load_tokenizer(data), make_batch(LENGTHS, states=4, vocab_size=load_tokenizer(data).vocab_size)
    rows = [torch.tensor([BOS, *tokenizer.encode(smiles), EOS]) for smiles in MOLECULES]
    stream = Stream.from_batch(batch)
    masked_ids, masked_attention, is_masked = padded_inputs(batch)
    pad, bounds = torch.nn.utils.rnn.pad_sequence, batch.cu_tokens.tolist()
    with torch.no_grad():
        hidden = [hidden_states(model, plain_stream(row)) for row in rows]
        expanded = hidden_states(model, stream)[: bounds[-1]].split(
            [stop - start for start, stop in zip(bounds, bounds[1:])]
        )
        chosen = stream.padded(torch.from_numpy(batch.is_masked), stream.cu_targets, stream.max_targets, False)
        distributions = distribution(model, stream)[chosen]
    assert (masked_ids[is_masked] == MASK).all() and len(distributions) == is_masked.sum() > 3
    tensors = {
        "input_ids": pad(rows, batch_first=True, padding_value=PAD),
        "hidden": pad(hidden, batch_first=True),
        "masked_ids": masked_ids,
        "masked_attention": masked_attention,
        "masked_hidden": pad(expanded, batch_first=True),
        "expanded_attention": pad([torch.ones(len(one)) for one in expanded], batch_first=True),
        "distribution": distributions,
    }
    save_file(tensors, folder / "stored.safetensors")
    (folder / "texts.json").write_text(json.dumps(MOLECULES))


def link_packages(folder: Path, *names: str) -> None:
    """What `pip install NAMES` brings, linked from where it is installed; other packages are not there."""
    folder.mkdir()
    waiting, done = list(names), set()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in done:
            continue
        done.add(name)
        package = metadata.distribution(name)
        for top in {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():  # several packages may have one folder in common
                (folder / top).symlink_to(package.locate_file(top))
        required = map(Requirement, package.requires or ())
        waiting += [one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
