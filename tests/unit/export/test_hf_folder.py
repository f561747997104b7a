"""The files of an export for the transformers library: which, their bytes, and what is never left or replaced."""

from __future__ import annotations

import json
import resource

import pytest
import torch
from hf_exports import make_checkpoint
from made_run import make_data

from exlm_dist.checkpoint.pieces import Piece
from exlm_dist.export.hf.hf_folder import CODE_FILES, export_hf
from exlm_dist.tracking import EventLog
from exlm_dist.utils.errors import CheckpointError, OutputError

FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", *CODE_FILES}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def exported(data, tmp_path_factory):
    """An exported ExLM."""
    folder = tmp_path_factory.mktemp("exported")
    export_hf(make_checkpoint(folder, data), folder / "out")
    return folder / "out"


def test_folder_has_the_files_and_each_matrix_once(exported):
    from safetensors.torch import load_file

    assert {path.name for path in exported.iterdir()} == FILES
    weights = load_file(exported / "model.safetensors")
    assert "exlm.embedding.weight" in weights and "output.decoder.weight" not in weights
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "exlm" and config["auto_map"]["AutoModel"] == "modeling_exlm.ExLMModel"
    assert all((exported / name).stat().st_mode & 0o777 == 0o644 for name in FILES)


def test_bytes_do_not_depend_on_the_layout(data, tmp_path, exported):
    def halves(shape):
        size = 1
        for extent in shape:
            size *= extent
        return [Piece(None, 0, size // 2, 0), Piece(None, size // 2, size, 1)]

    state = {"step": 7, "data_fingerprint": "f00d", "layout": {"world": 2}}
    export_hf(make_checkpoint(tmp_path, data, cut=halves, state=state), tmp_path / "out")
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (exported / name).read_bytes(), name


def test_model_card(data, tmp_path):
    checkpoint = make_checkpoint(tmp_path, data)
    log = EventLog(tmp_path / "run" / "events.jsonl")
    tags = {"split": "valid", "sequences": 30, "mask_ratio": 0.15}
    log.child_run("evaluate", 7, {"valid/nll": 1.25, "valid/accuracy": 0.5}, tags)
    log.metrics(7, {"valid/nll": 1.5, "valid/accuracy": 0.25})
    log.child_run("final", 7, {"valid/nll": 1.5, "valid/accuracy": 0.25}, {"budget": "unit-test"})
    log.child_run("evaluate", 8, {"valid/nll": 9.0, "valid/accuracy": 0.5}, tags)
    log.close()
    export_hf(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "unit-test",
        "f00d",
        '"stereo": "keep"',
        "| valid | 15% of 30 sequences | 1.2500 | 50.00% |",
        "| valid | while training | 1.5000 |",
    ):
        assert words in card
    assert card.count("while training") == 1 and "9.0" not in card and checkpoint.name not in card


def test_only_an_export_is_replaced(data, tmp_path):
    checkpoint = make_checkpoint(tmp_path, data)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    for out in (other, checkpoint, checkpoint / "index.json"):
        with pytest.raises(OutputError, match="exists and is not a folder with an ExLM model"):
            export_hf(checkpoint, out, overwrite=True)
    out = tmp_path / "new" / "nested"
    export_hf(checkpoint, out)
    (out / "stale").touch()
    with pytest.raises(OutputError, match="already.* --overwrite"):
        export_hf(checkpoint, out)
    assert (out / "stale").is_file()
    export_hf(checkpoint, out, overwrite=True)
    assert {path.name for path in out.iterdir()} == FILES
    assert [path.name for path in out.parent.iterdir()] == ["nested"]


def test_a_limit_on_file_sizes_is_named_and_leaves_nothing(data, tmp_path):
    checkpoint = make_checkpoint(tmp_path, data)
    (tmp_path / "parent").mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OutputError, match=r"out: a file in it would be larger than .*ulimit -f unlimited"):
            export_hf(checkpoint, tmp_path / "parent" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "parent").iterdir())


def test_inputs_that_cannot_be_exported_leave_nothing(data, tmp_path):
    checkpoint = make_checkpoint(tmp_path, data)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="no folder. Give a run folder"):
        export_hf(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(OutputError, match="index.json is a file. Choose another place"):
        export_hf(checkpoint, checkpoint / "index.json" / "out")
    weights, tokenizer = checkpoint / "model-00000.safetensors", checkpoint / "tokenizer" / "tokenizer.json"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="is damaged"):
        export_hf(checkpoint, tmp_path / "out")
    weights.write_bytes(content)
    tokenizer.unlink()
    with pytest.raises(CheckpointError, match="tokenizer/tokenizer.json is missing"):
        export_hf(checkpoint, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == before
