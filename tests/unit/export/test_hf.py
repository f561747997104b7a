"""The folder for the transformers library: its files, and the same numbers as our model there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoints import write_checkpoint
from made_run import MOLECULES, make_config, make_data
from packed import make_batch

from exlm_dist.checkpoint.pieces import Piece
from exlm_dist.checkpoint.reader import read_config
from exlm_dist.config import dump_config
from exlm_dist.export.hf.hf_folder import CODE_FILES, export_hf
from exlm_dist.inference.loading import load_model
from exlm_dist.model.build import build_model
from exlm_dist.model.objective import prior_marginals
from exlm_dist.model.stream import Stream
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.tokenizers.tokenizer import MASK, NUM_SPECIAL, PAD
from exlm_dist.tracking import EventLog
from exlm_dist.utils.errors import CheckpointError

FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", *CODE_FILES}
VARIANTS = {
    "exlm": {},
    "untied post": {"tie_head": False, "norm": "post", "layers": 2},
    "sparse": {"transitions": "sparse", "states": 3},
    "uniform 1d": {"transitions": "uniform", "rotary": "1d"},
    "no anchors": {"anchors": False, "states": 2, "transition_positions": False},
    "mlm": {"objective": "mlm", "states": 1, "anchors": False},
}
LENGTHS = [9, 4, 14, 1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """The library, which copies the code of a model into a cache of its own before it runs it."""
    library = pytest.importorskip("transformers", minversion="5", reason="the transformers library is not installed")
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", list(sys.path))
        yield library


def make_checkpoint(folder: Path, data: Path, variant: str = "exlm", **written) -> Path:
    """Checkpoint of a model whose weights are far enough from their initial values to tell tokens and states apart."""
    config = make_config(folder, "run", data)
    model = config.model.model_copy(update=VARIANTS[variant])
    config = config.model_copy(update={"model": model})
    (folder / "run" / "checkpoints").mkdir(parents=True)
    net = build_model(model, load_tokenizer(data).vocab_size, seed=3)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: (value.detach() + 0.3 * torch.randn(value.shape, generator=generator)).numpy()
        for name, value in net.named_parameters()
    }
    state = {"step": 7, "data_fingerprint": "f00d", "layout": {"world": 1}}
    about = {"state": state, "config": dump_config(config), "tokenizer": data / "tokenizer", **written}
    return write_checkpoint(folder / "run", 7, model=weights, optimizer={}, **about)


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, data, tmp_path_factory):
    """(our model, the exported folder)."""
    folder = tmp_path_factory.mktemp("pair")
    checkpoint = make_checkpoint(folder, data, request.param)
    export_hf(checkpoint, folder / "out")
    return load_model(checkpoint, read_config(checkpoint), load_tokenizer(data)), folder / "out"


@pytest.fixture(scope="module")
def exported(data, tmp_path_factory):
    """An exported ExLM."""
    folder = tmp_path_factory.mktemp("exported")
    export_hf(make_checkpoint(folder, data), folder / "out")
    return folder / "out"


def padded_inputs(batch, left: bool = False):
    """(input_ids, attention_mask, is_masked) [B, L]: the sequences of a batch before their expansion."""
    rows, marks = [], []
    masked = dict(zip(batch.state_index[:: batch.states].tolist(), batch.is_masked.tolist()))
    for start, stop in zip(batch.cu_tokens[:-1].tolist(), batch.cu_tokens[1:].tolist()):
        kept = [i for i in range(start, stop) if batch.clone[i] < 2]
        rows.append(batch.input_ids[kept].tolist())
        marks.append([masked.get(i, False) for i in kept])
    longest = max(map(len, rows))

    def pad(row, value):
        fill = [value] * (longest - len(row))
        return fill + list(row) if left else list(row) + fill

    ids = torch.tensor([pad(row, PAD) for row in rows])
    attention = torch.tensor([pad([1] * len(row), 0) for row in rows])
    return ids, attention, torch.tensor([pad(row, False) for row in marks])


def distribution(model, stream: Stream) -> torch.Tensor:
    """log sum_u q_i(u) p_u(w), [B, N, V], with our prior marginals."""
    result = model(stream)
    hidden = hidden_states(model, stream)[stream.state_index]
    head = model.output
    log_p = F.linear(head.norm(F.gelu(head.dense(hidden))), head.weight, head.bias).log_softmax(-1)
    padded = stream.padded(log_p, stream.cu_states, stream.max_states, 0.0)
    return torch.logsumexp(prior_marginals(result).log()[..., None] + padded[:, None], 2)


def hidden_states(model, stream: Stream) -> torch.Tensor:
    """Features of all expanded tokens, [T, D]."""
    stream = stream.replace(select=False)
    for layer in [model.embedding, *model.blocks, model.norm]:
        stream = layer(stream)
    return stream.hidden


# The files, without the library


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
    with pytest.raises(CheckpointError, match="no earlier export"):
        export_hf(checkpoint, other)
    out = tmp_path / "new" / "nested"
    export_hf(checkpoint, out)
    (out / "stale").touch()
    export_hf(checkpoint, out)
    assert {path.name for path in out.iterdir()} == FILES
    assert [path.name for path in out.parent.iterdir()] == ["nested"]


def test_a_failed_export_leaves_nothing(data, tmp_path, monkeypatch):
    checkpoint = make_checkpoint(tmp_path, data)
    (tmp_path / "parent").mkdir()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("exlm_dist.export.hf.hf_folder.write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        export_hf(checkpoint, tmp_path / "parent" / "out")
    assert not list((tmp_path / "parent").iterdir())


# The same numbers as ours


def expanded_batch(folder: Path):
    """Random sequences, expanded as the model of the folder wants them."""
    config = json.loads((folder / "config.json").read_text())
    sizes = {"states": config["states"], "anchors": config["anchors"], "vocab_size": config["vocab_size"]}
    return make_batch(LENGTHS, **sizes)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_hidden_states_and_distributions_with_masks(pair, transformers, left):
    ours, folder = pair
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
    batch = expanded_batch(folder)
    stream = Stream.from_batch(batch)
    ids, attention, is_masked = padded_inputs(batch, left)
    with torch.no_grad():
        out = theirs(ids, attention, output_hidden_states=True)
        last = theirs.exlm.norm(out.hidden_states[-1])
        wanted, expected = hidden_states(ours, stream), distribution(ours, stream)
    bounds = batch.cu_tokens.tolist()
    for b, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        assert (last[b, : stop - start] - wanted[start:stop]).abs().max() < 1e-5
    chosen = stream.padded(torch.from_numpy(batch.is_masked), stream.cu_targets, stream.max_targets, False)
    assert is_masked.any() and (ids[is_masked] == MASK).all()
    assert (out.logits[is_masked] - expected[chosen]).abs().max() < 2e-5
    assert (out.logits[is_masked].logsumexp(-1)).abs().max() < 1e-5


def test_hidden_states_without_masks(pair, transformers):
    ours, folder = pair
    theirs = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    rows = [torch.randint(NUM_SPECIAL, ours.output.words, (n,)) for n in (5, 11, 1)]
    with torch.no_grad():
        for row in rows:
            none = torch.zeros(0, dtype=torch.int64)
            bounds = torch.tensor([0, len(row)])
            stream = Stream(
                row, torch.arange(len(row)), torch.zeros_like(row), bounds, none, bounds * 0, none, bounds * 0,
                torch.tensor([0]), len(row), 0, 0, 1,
            )  # fmt: skip
            wanted = hidden_states(ours, stream)
            padded = F.pad(row, (2, 3), value=PAD)[None]
            attention = F.pad(torch.ones_like(row), (2, 3))[None]
            assert (theirs(row[None]).last_hidden_state[0] - wanted).abs().max() < 1e-5
            assert (theirs(padded, attention).last_hidden_state[0, 2:-3] - wanted).abs().max() < 1e-5


def test_rows_with_and_without_masks_in_one_batch(exported, transformers):
    model = transformers.AutoModelForMaskedLM.from_pretrained(exported, trust_remote_code=True).eval()
    masked, plain = torch.tensor([[0, 7, 4, 8, 4, 2]]), torch.tensor([[0, 7, 9, 8, 6, 2]])
    both = model(torch.cat([plain, masked])).logits
    assert (both[:1] - model(plain).logits).abs().max() < 1e-5
    assert (both[1:] - model(masked).logits).abs().max() < 1e-5


# The library's own ways


def test_the_package_is_not_needed(exported, tmp_path):
    pytest.importorskip("transformers", minversion="5", reason="the transformers library is not installed")
    program = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "exlm_dist":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline
folder = {str(exported)!r}
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
best = pipeline("fill-mask", model=model, tokenizer=tokenizer)("CC(=O)<mask>c1ccc<mask>cc1")
assert len(best) == 2 and abs(sum(one["score"] for one in best[0])) <= 1.0
assert "exlm_dist" not in sys.modules
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tokenizer_of_the_folder(exported, transformers, data):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    ours = load_tokenizer(data)
    batch = tokenizer(MOLECULES, padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"} and tokenizer.mask_token_id == MASK
    for row, smiles in zip(batch["input_ids"].tolist(), MOLECULES):
        assert [token for token in row if token >= NUM_SPECIAL] == ours.encode(smiles)
        assert tokenizer.decode(row, skip_special_tokens=True) == smiles


@pytest.mark.parametrize("variant", ["exlm", "untied post"])
def test_save_pretrained_round_trip(data, tmp_path, transformers, variant):
    export_hf(make_checkpoint(tmp_path, data, variant), tmp_path / "out")
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    model.save_pretrained(tmp_path / "again")
    assert {"model.safetensors", "config.json", *CODE_FILES} <= {path.name for path in (tmp_path / "again").iterdir()}
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    ids = torch.tensor([[0, 7, 4, 8, 2]])
    assert torch.equal(model(ids).logits, again(ids).logits)
    tied = again.output.decoder.weight.data_ptr() == again.exlm.embedding.weight.data_ptr()
    assert tied == (variant == "exlm")


HEADS = {
    "AutoModelForSequenceClassification": {"labels": [1, 0]},
    "AutoModelForTokenClassification": {"labels": [[-100, 1, 0, 1, -100], [-100, 1, -100, -100, -100]]},
    "AutoModelForQuestionAnswering": {"start_positions": [1, 2], "end_positions": [2, 99]},
    "AutoModelForMaskedLM": {"labels": [[-100, -100, 8, -100, -100], [-100, 6, -100, -100, -100]]},
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_have_finite_gradients_and_checkpointing_changes_none(exported, transformers, name):
    model = getattr(transformers, name).from_pretrained(exported, trust_remote_code=True, dtype=torch.float32)
    ids, attention = torch.tensor([[0, 7, 4, 8, 2], [0, 4, 2, 1, 1]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    targets = {key: torch.tensor(value) for key, value in HEADS[name].items()}
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model.train()
        model(ids, attention, **targets).loss.backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    for key, gradient in gradients[0].items():
        assert torch.isfinite(gradient).all() and torch.allclose(gradient, gradients[1][key], atol=1e-6), key
    assert isinstance(model(ids, attention, return_dict=False), tuple)


@pytest.mark.parametrize(
    "problem, count, labels",
    [
        ("regression", 1, [[0.5], [1.5]]),
        ("single_label_classification", 3, [2, 0]),
        ("multi_label_classification", 3, [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
    ],
)
def test_problem_types(exported, transformers, problem, count, labels):
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model = load(exported, trust_remote_code=True, num_labels=count).eval()
    out = model(torch.tensor([[0, 7, 2], [0, 8, 2]]), labels=torch.tensor(labels))
    assert out.logits.shape == (2, count) and torch.isfinite(out.loss) and model.config.problem_type == problem


def test_masked_loss_is_the_cross_entropy_of_the_distribution(exported, transformers):
    model = transformers.AutoModelForMaskedLM.from_pretrained(exported, trust_remote_code=True).eval()
    ids, labels = torch.tensor([[0, 7, 4, 8, 4, 2]]), torch.tensor([[-100, -100, 9, -100, 6, -100]])
    out = model(ids, labels=labels)
    assert torch.isclose(out.loss, -(out.logits[0, 2, 9] + out.logits[0, 4, 6]) / 2)


def test_too_long_a_sequence_is_refused(exported, transformers):
    load = transformers.AutoModelForMaskedLM.from_pretrained
    model = load(exported, trust_remote_code=True).eval()
    with pytest.raises(ValueError, match="max_position_embeddings = 256"):
        model(torch.full((1, 100), MASK))


def test_three_steps_of_the_trainer(exported, transformers, tmp_path):
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate, which is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    model = transformers.AutoModelForMaskedLM.from_pretrained(exported, trust_remote_code=True)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            learning_rate=1e-3,
            disable_tqdm=True,
        ),  # fmt: skip
        train_dataset=[tokenizer(smiles) for smiles in MOLECULES],
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer),
    )
    before = model.output.dense.weight.detach().clone()
    assert trainer.train().global_step == 3
    assert not torch.equal(before, model.output.dense.weight)
