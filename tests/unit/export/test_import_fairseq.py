"""Weights of the authors' code as checkpoints, and back: no bit changes, and what does not fit is said."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import write_checkpoint
from made_run import make_config, make_data
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from exlm_dist.checkpoint import reader
from exlm_dist.cli import main
from exlm_dist.config import dump_config
from exlm_dist.config.schema import ModelConfig
from exlm_dist.evaluation.masked_lm import evaluate_checkpoint
from exlm_dist.export.fairseq import EMBEDDING, METADATA, TIED_COPY, export_fairseq
from exlm_dist.export.hf.hf_folder import export_hf
from exlm_dist.export.import_fairseq import import_fairseq
from exlm_dist.model.build import build_model
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.tokenizers.sentencepiece_tokenizer import MODEL_FILE, SentencePieceTokenizer
from exlm_dist.tokenizers.tokenizer import MASK, NUM_SPECIAL, UNK
from exlm_dist.utils.errors import CheckpointError, ConfigError, DataError, OutputError, UserError

VARIANTS = {
    "exlm": {},
    "untied post": {"tie_head": False, "norm": "post", "layers": 2, "states": 3},
    "no positions": {"transition_positions": False},
    "uniform": {"transitions": "uniform", "anchors": False},
    "mlm": {"objective": "mlm", "states": 1, "anchors": False},
    "prior": {"jump_prior": "group"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("prepared"))


def make_checkpoint(folder: Path, data: Path, variant: str = "exlm") -> Path:
    config = make_config(folder / "runs", "run-a", data)
    model = ModelConfig.model_validate(config.model.model_dump() | VARIANTS[variant])
    config = config.model_copy(update={"model": model})
    net = build_model(config.model, load_tokenizer(data).vocab_size, seed=3)
    noise = torch.Generator().manual_seed(5)
    weights = {name: (p.detach() + torch.randn(p.shape, generator=noise)).numpy() for name, p in net.named_parameters()}
    (folder / "run/checkpoints").mkdir(parents=True)
    return write_checkpoint(
        folder / "run",
        7,
        model=weights,
        optimizer={},
        state={"step": 7, "data_fingerprint": "f00d"},
        config=dump_config(config),
        tokenizer=data / "tokenizer",
    )


@pytest.fixture
def exported(tmp_path, data) -> Path:
    """An export of ours."""
    export_fairseq(make_checkpoint(tmp_path / "made", data), tmp_path / "ours.safetensors")
    return tmp_path / "ours.safetensors"


@pytest.fixture
def theirs(exported, tmp_path) -> Path:
    """The same weights without what our export says of them."""
    save_file(load_file(exported), tmp_path / "theirs.safetensors")
    return tmp_path / "theirs.safetensors"


@pytest.fixture
def config(exported, tmp_path) -> Path:
    """A file with the `model` section of these weights alone."""
    with safe_open(exported, "pt") as file:
        model = json.loads(file.metadata()[METADATA])["model"]
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": model}))
    return tmp_path / "model.yaml"


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_and_there_again(variant, tmp_path, data):
    source = make_checkpoint(tmp_path / "made", data, variant)
    first, second = tmp_path / "1.safetensors", tmp_path / "new/2.safetensors"
    assert main(["export", "fairseq", str(source), "--out", str(first)]) == 0
    arguments = ["import", "fairseq", str(first), "--out", str(tmp_path / "back"), "--tokenizer", str(data)]
    assert main(arguments) == 0
    back, before = reader.load_weights(tmp_path / "back"), reader.load_weights(source)
    assert back.keys() == before.keys() and all(torch.equal(back[name], value) for name, value in before.items())
    assert reader.read_config(tmp_path / "back").model == reader.read_config(source).model
    assert load_tokenizer(tmp_path / "back").fingerprint == load_tokenizer(data).fingerprint
    assert main(["export", "fairseq", str(tmp_path / "back"), "--out", str(second)]) == 0
    assert second.read_bytes() == first.read_bytes()


def test_a_prior_over_jumps_goes_out_with_a_warning_and_comes_in_from_our_files_alone(
    theirs, config, tmp_path, data, capsys
):
    for variant, warned in (("prior", True), ("exlm", False)):
        source = make_checkpoint(tmp_path / variant, data, variant)
        assert main(["export", "fairseq", str(source), "--out", str(tmp_path / f"{variant}.safetensors")]) == 0
        assert ("warning: their code has no prior over jumps (model.jump_prior group)" in capsys.readouterr().out) == (
            warned
        )
    model = yaml.safe_load(config.read_text())["model"]
    config.write_text(yaml.safe_dump({"model": model | {"jump_prior": "laplace"}}))
    with pytest.raises(ConfigError, match=r"model.yaml:\d+: model.jump_prior laplace.*Set it to none"):
        import_fairseq(theirs, tmp_path / "back", tokenizer=data, config=config)
    del model["jump_prior"]
    config.write_text(yaml.safe_dump({"model": model}))
    import_fairseq(theirs, tmp_path / "back", tokenizer=data, config=config)
    assert reader.read_config(tmp_path / "back").model.jump_prior == "none"


def test_an_import_is_a_checkpoint(exported, tmp_path, data):
    out = tmp_path / "back"
    import_fairseq(exported, out, tokenizer=data)
    assert reader.step_of(out) == 7 and reader.read_state(out)["data_fingerprint"] == "f00d"
    nll = evaluate_checkpoint(tmp_path / "made/run", data=data).nll
    assert evaluate_checkpoint(out, data=data).nll == pytest.approx(nll, rel=1e-6)  # in batches of another size
    with pytest.raises(DataError, match="imported weights; give --data"):
        evaluate_checkpoint(out)
    export_hf(out, tmp_path / "hf")
    card = (tmp_path / "hf/README.md").read_text()
    assert "import of fairseq weights (ours.safetensors" in card and "Learning rate" not in card


def test_the_model_comes_from_a_file_of_settings(theirs, config, exported, tmp_path, data):
    with pytest.raises(ConfigError, match=r"does not say what model .* --config"):
        import_fairseq(theirs, tmp_path / "out", tokenizer=data)
    import_fairseq(theirs, tmp_path / "out", tokenizer=data, config=config)
    import_fairseq(exported, tmp_path / "other", tokenizer=data)
    assert reader.load_weights(tmp_path / "out").keys() == reader.load_weights(tmp_path / "other").keys()
    assert reader.read_config(tmp_path / "out").name == "theirs" and reader.step_of(tmp_path / "out") == 0
    with pytest.raises(ConfigError, match="Leave out --config"):
        import_fairseq(exported, tmp_path / "out", tokenizer=data, config=config)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"layers": 3}, "model.layers is 1 by the weights, not 3"),
        ({"width": 32, "ffn": 8}, "model.width is 16 by the weights, not 32; model.ffn is 32 by the weights, not 8"),
        ({"heads": 4}, "model.heads is 2 by the weights, not 4"),
        ({"max_positions": 64}, "model.max_positions is 256 by the weights, not 64"),
        ({"tie_head": False}, "model.tie_head is true by the weights, not false"),
        ({"transition_positions": False}, "model.transition_positions is true by the weights, not false"),
        ({"transitions": "uniform"}, r"output.transition.gate.bias is \(2,\) there and missing in the model"),
        ({"heads": 3}, "heads"),
        ({"layer": 3}, "model.layer: unknown setting"),
    ],
)
def test_settings_of_another_model(theirs, config, tmp_path, data, changes, words):
    model = yaml.safe_load(config.read_text())["model"]
    config.write_text(yaml.safe_dump({"model": model | changes}))
    with pytest.raises(ConfigError, match=words):
        import_fairseq(theirs, tmp_path / "out", tokenizer=data, config=config)
    assert not (tmp_path / "out").exists()


def test_settings_without_a_model(theirs, tmp_path, data):
    (tmp_path / "empty.yaml").write_text("name: x\n")
    with pytest.raises(ConfigError, match="no `model` section"):
        import_fairseq(theirs, tmp_path / "out", tokenizer=data, config=tmp_path / "empty.yaml")


def test_another_tokenizer(exported, theirs, config, tmp_path, data):
    same_size = make_data(tmp_path / "same", extra_token="[K+]")
    with pytest.raises(DataError, match="Give --tokenizer the data or a checkpoint of that run"):
        import_fairseq(exported, tmp_path / "out", tokenizer=same_size)
    other = make_data(tmp_path / "small", extra_token="C")
    with pytest.raises(DataError, match=r"a row for each of 15 tokens, but the tokenizer has 14"):
        import_fairseq(theirs, tmp_path / "out", tokenizer=other, config=config)
    with pytest.raises(DataError, match="no tokenizer"):
        import_fairseq(exported, tmp_path / "out", tokenizer=tmp_path)


def write_dictionary(path: Path, tokens: list[str]) -> Path:
    path.write_text("".join(f"{token} {count}\n" for count, token in enumerate(tokens, 1)))
    return path


def test_rows_in_the_order_of_a_dictionary(theirs, config, tmp_path, data):
    """Tokens in another order, one missing, one too many: each row goes to its token."""
    tokens = load_tokenizer(data).tokens()
    ours = tokens[NUM_SPECIAL:]
    entries = ["madeupword0000", *reversed(ours[1:])]
    state = load_file(theirs)
    named = dict(zip([*tokens[:MASK], *ours, "<mask>"], state[EMBEDDING]))
    named["madeupword0000"] = torch.full_like(named["<mask>"], 9.0)
    state[EMBEDDING] = torch.stack([named[token] for token in [*tokens[:MASK], *entries, "<mask>"]])
    state[TIED_COPY] = state[EMBEDDING].clone()
    save_file(state, theirs)
    dictionary = write_dictionary(tmp_path / "dict.txt", entries)
    said = import_fairseq(theirs, tmp_path / "out", tokenizer=data, config=config, dictionary=dictionary)
    assert "(1 tokens that its dictionary lacks are as <unk>; 1 of its tokens left out)" in said
    found = reader.load_weights(tmp_path / "out")["embedding.weight"]
    for token, row in zip(tokens, found):
        assert torch.equal(row, named[tokens[UNK] if token == ours[0] else token]), token


def test_a_dictionary_of_something_else(theirs, config, tmp_path, data):
    count = load_tokenizer(data).vocab_size - NUM_SPECIAL
    for number, words in ((count + 1, "the weights have 15"), (count, "lacks 10 of the 10 tokens")):
        dictionary = write_dictionary(tmp_path / "dict.txt", [f"w{i}" for i in range(number)])
        with pytest.raises(DataError, match=words):
            import_fairseq(theirs, tmp_path / "out", tokenizer=data, config=config, dictionary=dictionary)
    with pytest.raises(DataError, match="cannot be read"):
        import_fairseq(theirs, tmp_path / "out", tokenizer=data, config=config, dictionary=tmp_path / "nothing")


def test_the_tokenizer_may_be_a_sentencepiece_model(theirs, config, tmp_path):
    words = [f"{a}{b}" for a in ("ba", "ko", "li") for b in ("ra", "ne", "tu")]
    tokenizer = SentencePieceTokenizer.train([" ".join(words)] * 20, 278)
    tokenizer.save(tmp_path / "sp")
    state = load_file(theirs)
    grown = {
        name: torch.randn(tokenizer.vocab_size, *value.shape[1:])
        for name, value in state.items()
        if name in (EMBEDDING, "encoder.lm_head.bias")
    }
    save_file({**state, **grown, TIED_COPY: grown[EMBEDDING].clone()}, theirs)
    import_fairseq(theirs, tmp_path / "out", tokenizer=tmp_path / "sp" / MODEL_FILE, config=config)
    assert load_tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint


class _Runs:
    def __reduce__(self):
        return (print, ("code of the file was run",))


def test_a_pickle_is_never_loaded_and_the_lines_that_convert_it_work(theirs, config, tmp_path, data, capsys):
    """The file is like fairseq's: fp16 weights, two of them one tensor, and the arguments as a Namespace."""
    state = load_file(theirs)
    half = {name: value.half() for name, value in state.items()}
    half[TIED_COPY] = half[EMBEDDING]
    half["encoder.sentence_encoder.version"] = torch.tensor([1])
    pickle = tmp_path / "checkpoint_best.pt"
    torch.save({"args": argparse.Namespace(arch="exlm"), "cfg": None, "model": half, "x": _Runs()}, pickle)
    with pytest.raises(ConfigError, match="a pickle, which may run any code") as caught:
        import_fairseq(pickle, tmp_path / "out", tokenizer=data, config=config)
    assert "code of the file" not in capsys.readouterr().out
    lines = str(caught.value).split("\n\n")[1]
    assert lines.startswith("import torch\n") and len(lines.splitlines()) == 4
    exec(compile(lines, "message", "exec"), {})
    import_fairseq(tmp_path / "checkpoint_best.safetensors", tmp_path / "out", tokenizer=data, config=config)
    rows = reader.load_weights(tmp_path / "out")["embedding.weight"]
    assert torch.equal(rows[:MASK], state[EMBEDDING][:MASK].half().float())
    torch.save(half, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ConfigError, match=re.escape(f"torch.load({str(tmp_path / 'old.pt')!r}")):
        import_fairseq(tmp_path / "old.pt", tmp_path / "out", tokenizer=data, config=config)


def test_files_that_are_no_weights(exported, tmp_path, data):
    def refused(kind: type[UserError], words: str, file: Path) -> None:
        with pytest.raises(kind, match=words):
            import_fairseq(file, tmp_path / "out", tokenizer=data)
        assert not (tmp_path / "out").exists()

    refused(ConfigError, "is no file", tmp_path / "nothing.safetensors")
    refused(ConfigError, "is no file", tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(exported.read_bytes()[:-4])
    refused(CheckpointError, "cannot be read as safetensors", tmp_path / "cut.safetensors")
    refused(
        CheckpointError,
        "no weights of the authors' code",
        tmp_path / "made/run/checkpoints/step-00000007" / "model-00000.safetensors",
    )
    with safe_open(exported, "pt") as file:
        metadata = file.metadata()
    state = load_file(exported)
    save_file(state | {"encoder.extra.weight": torch.zeros(1)}, tmp_path / "more.safetensors", metadata)
    refused(CheckpointError, "unknown entries .* encoder.extra.weight", tmp_path / "more.safetensors")
    less = {name: value for name, value in state.items() if name != "encoder.lm_head.bias"}
    save_file(less, tmp_path / "less.safetensors", metadata)
    refused(ConfigError, r"output.bias is missing there and \(15,\) in the model", tmp_path / "less.safetensors")
    state["encoder.lm_head.bias"][3] = torch.nan
    save_file(state, tmp_path / "nan.safetensors", metadata)
    refused(CheckpointError, "parameter output.bias has values that are not finite", tmp_path / "nan.safetensors")


def test_an_earlier_output_is_replaced_and_nothing_else(exported, tmp_path, data):
    export_fairseq(tmp_path / "made/run", exported)
    foreign = [tmp_path / "text", tmp_path / "plain.safetensors", tmp_path / "made"]
    foreign[0].write_text("mine")
    save_file({"a": torch.zeros(1)}, foreign[1])
    with pytest.raises(OutputError, match="text is a file"):
        export_fairseq(tmp_path / "made/run", foreign[0] / "out.safetensors")
    with pytest.raises(OutputError, match="text is a file"):
        import_fairseq(exported, foreign[0] / "out", tokenizer=data)
    for out in foreign:
        with pytest.raises(ConfigError, match="no earlier output of `exlm export fairseq`"):
            export_fairseq(tmp_path / "made/run", out)
        with pytest.raises(ConfigError, match="no earlier output of `exlm import fairseq`"):
            import_fairseq(exported, out, tokenizer=data)
    import_fairseq(exported, tmp_path / "out", tokenizer=data)
    import_fairseq(exported, tmp_path / "out", tokenizer=data)
    assert reader.verify(tmp_path / "out")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["made", "ours.safetensors", "out", "plain.safetensors", "text"]
