"""What a new run takes from the weights of a checkpoint, and what it says where it can take nothing."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from made_run import make_config, make_data, write_initial_checkpoint

from exlm_dist.checkpoint import hf_export, reader
from exlm_dist.checkpoint.pieces import Slice
from exlm_dist.checkpoint.tensors import TensorReader
from exlm_dist.config.schema import ModelConfig
from exlm_dist.export.hf.hf_folder import export_hf
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.training.warm_start import (
    InitialWeights,
    Source,
    candidates,
    check_architecture,
    identify,
    match_parameters,
    open_source,
    other_states,
    summary,
    table,
)
from exlm_dist.utils.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return write_initial_checkpoint(make_config(folder, "run", data), folder)


@pytest.fixture
def exported(checkpoint, tmp_path) -> Path:
    export_hf(checkpoint, tmp_path / "hf")
    return tmp_path / "hf"


def source(model: ModelConfig) -> Source:
    return Source({"path": "there"}, model, [], None)


# What is matched

SHAPES = {"embedding.weight": (4, 2), "blocks.0.ffn.up.weight": (3, 2), "output.bias": (4,)}


def test_the_same_vocabulary_is_taken_whole():
    match = match_parameters(SHAPES, SHAPES, "abcd", "abcd")
    assert match.whole == {name: name for name in SHAPES}
    assert not (match.rows or match.initialised or match.unused or match.new_tokens)


def test_rows_go_by_their_token():
    ours = {**SHAPES, "embedding.weight": (5, 2), "output.bias": (5,)}
    match = match_parameters(ours, SHAPES, "xdbya", "abcd")
    assert list(match.whole) == ["blocks.0.ffn.up.weight"] and match.new_tokens == ["x", "y"]
    for name in ("embedding.weight", "output.bias"):
        assert match.rows[name].into.tolist() == [1, 2, 4] and match.rows[name].out_of.tolist() == [3, 1, 0]


def test_of_a_token_that_is_there_twice_the_first_counts():
    match = match_parameters(SHAPES, {**SHAPES, "output.bias": (5,)}, "abcd", "aabcd")
    assert match.rows["output.bias"].out_of.tolist() == [0, 2, 3, 4]


@pytest.mark.parametrize("here, there, common", [(6, 4, 4), (4, 6, 4)])
def test_positions_are_cut_or_filled_up(here, there, common):
    name = "output.transition.positions.weight"
    match = match_parameters({**SHAPES, name: (here, 2)}, {**SHAPES, name: (there, 2)}, "abcd", "abcd")
    assert match.rows[name].into.tolist() == match.rows[name].out_of.tolist() == list(range(common))


def test_heads_that_one_side_lacks():
    head = {"output.transition.gate.bias": (2,), "output.transition.query.weight": (2, 4)}
    assert match_parameters({**SHAPES, **head}, SHAPES, "abcd", "abcd").initialised == list(head)
    assert match_parameters(SHAPES, {**SHAPES, **head}, "abcd", "abcd").unused == list(head)
    other = {**head, "output.transition.query.weight": (2, 2)}  # without positions
    match = match_parameters({**SHAPES, **head}, {**SHAPES, **other}, "abcd", "abcd")
    assert match.initialised == ["output.transition.query.weight"] and match.unused == []


def test_tied_and_untied_token_heads():
    untied = {**SHAPES, "output.weight": (4, 2)}
    assert match_parameters(untied, SHAPES, "abcd", "abcd").whole["output.weight"] == "embedding.weight"
    assert match_parameters(SHAPES, untied, "abcd", "abcd").unused == ["output.weight"]
    assert match_parameters(untied, SHAPES, "dcba", "abcd").rows["output.weight"].name == "embedding.weight"


def test_any_part_of_a_parameter_is_that_part_of_the_whole(checkpoint):
    """By slices and ranges, as layouts ask for them."""
    tensors = TensorReader(checkpoint)
    theirs = tensors.index.shapes
    tokens = load_tokenizer(checkpoint).tokens()
    ours = {**theirs, "embedding.weight": (len(tokens) + 2, 16), "output.bias": (len(tokens) + 2,)}
    match = match_parameters(ours, theirs, [*reversed(tokens), "X", "Y"], tokens)
    opened = Source(identify(checkpoint), ModelConfig(), tokens, tensors)
    weights = InitialWeights(opened, match, ours, seed=1, std=0.02)
    embedding = tensors.whole("embedding.weight", None)
    whole = weights.read("embedding.weight", None, None, 0, 16 * (len(tokens) + 2)).reshape(-1, 16)
    assert np.array_equal(whole[: len(tokens)], embedding[::-1]) and 0 < np.abs(whole[len(tokens) :]).max() < 0.2
    part = weights.read("embedding.weight", None, Slice(0, 3, 9), 5, 40)
    assert np.array_equal(part, whole[3:9].reshape(-1)[5:40])
    part = weights.read("embedding.weight", None, Slice(1, 2, 7), 5, 40)
    assert np.array_equal(part, whole[:, 2:7].reshape(-1)[5:40])
    name = "blocks.0.attention.qkv.weight"
    assert np.array_equal(weights.read(name, None, None, 7, 30), tensors.whole(name, None).reshape(-1)[7:30])
    told = table({**opened.about, **summary(match, ours, [])}, match.new_tokens)
    assert f"embedding.weight: {len(tokens)} of {len(tokens) + 2} rows" in told and "2: X, Y" in told
    assert "otherwise" not in told


def test_other_states_and_transitions_are_named(checkpoint):
    opened = open_source(checkpoint, identify(checkpoint))
    assert other_states(opened, opened.model) == []
    other = opened.model.model_copy(update={"jump_prior": "gaussian", "dropout": 0.3})
    said = other_states(opened, other)
    assert said == [f"model.jump_prior is gaussian here, {opened.model.jump_prior} there"]
    match = match_parameters(SHAPES, SHAPES, "abcd", "abcd")
    assert said[0] in table({**opened.about, **summary(match, SHAPES, said)}, [])
    assert other_states(opened, other.model_copy(update={"objective": "mlm"})) == []


# An export for transformers


def test_an_export_has_the_weights_the_tokens_and_the_settings(checkpoint, exported):
    told = identify(exported)
    opened, original = open_source(exported, told), open_source(checkpoint, identify(checkpoint))
    assert told["step"] is None and opened.model == original.model and opened.tokens == original.tokens
    assert opened.tensors.index.shapes.keys() == original.tensors.index.shapes.keys()
    for name in opened.tensors.index.shapes:
        assert np.array_equal(opened.tensors.whole(name, None), original.tensors.whole(name, None))


def test_settings_that_transformers_leaves_out_have_its_defaults():
    """`save_pretrained` writes only what differs from the defaults of `ExLMConfig`."""
    path = Path(hf_export.__file__).parents[1] / "export/hf/configuration_exlm.py"
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    arguments = next(node.args for node in functions if node.name == "__init__")
    values = [ast.literal_eval(value) for value in arguments.defaults]
    defaults = dict(zip([argument.arg for argument in arguments.args[-len(values) :]], values))
    assert {key: defaults[key] for key in hf_export.SETTINGS} == {
        key: getattr(ModelConfig(jump_prior="none"), setting) for key, setting in hf_export.SETTINGS.items()
    }


def test_vocabularies_of_transformers_as_a_list_and_as_a_table(tmp_path):
    for vocabulary in ([["a", 0.0], ["b", -1.5]], {"b": 1, "a": 0}):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
        assert hf_export.read_tokens(tmp_path) == ["a", "b"]


def test_damaged_exports_are_refused(exported):
    weights = exported / "model.safetensors"
    whole = weights.read_bytes()
    for content, why in ((whole[:-4], "damaged"), (whole[:5], "too short"), (b"\xff" * 64, "cannot be read")):
        weights.write_bytes(content)
        with pytest.raises(CheckpointError, match=why):
            open_source(exported, {})
    weights.write_bytes(whole.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(CheckpointError, match="is I32: save the model in float32"):
        open_source(exported, {})
    weights.write_bytes(whole)
    (exported / "tokenizer.json").write_text('{"model": {"vocab": [["a", 0.0]]}}')
    with pytest.raises(CheckpointError, match=r"the embedding has \d+ rows, but its tokenizer 1 tokens"):
        open_source(exported, {})
    weights.unlink()
    with pytest.raises(CheckpointError, match="no model.safetensors"):
        open_source(exported, {})


# Where nothing can be taken


def test_each_setting_of_another_architecture_is_named_with_what_works():
    theirs, ours = ModelConfig(layers=3, width=64, heads=4), ModelConfig(layers=2, width=64, heads=8, states=7)
    with pytest.raises(ConfigError) as caught:
        check_architecture(source(theirs), ours)
    assert "model.layers is 3 there, 2 here" in str(caught.value) and "width" not in str(caught.value)
    assert str(caught.value).endswith("--model.layers 3 --model.heads 4")
    free = {"states": 2, "objective": "mlm", "max_positions": 64, "dropout": 0.0, "jump_prior": "group"}
    check_architecture(source(theirs), theirs.model_copy(update=free))


def test_what_is_no_checkpoint_is_named(data, checkpoint, exported, tmp_path):
    with pytest.raises(ConfigError, match="there is no folder"):
        candidates(str(tmp_path / "nowhere"))
    (tmp_path / "model.pt").touch()
    with pytest.raises(ConfigError, match="exlm import fairseq"):
        candidates(str(tmp_path / "model.pt"))
    for folder in (data, tmp_path):
        with pytest.raises(ConfigError, match="has no checkpoint"):
            candidates(str(folder))
    assert candidates(str(checkpoint)) == [checkpoint] == candidates(str(checkpoint.parents[1]))
    assert candidates(str(exported)) == [exported] and not reader.is_checkpoint(exported)
