"""An export in the transformers library: the same numbers as our model, and the library's own ways."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hf_exports import (
    LENGTHS,
    VARIANTS,
    distribution,
    hidden_states,
    make_checkpoint,
    padded_inputs,
    plain_stream,
)
from made_run import MOLECULES, make_data
from packed import make_batch

from exlm_dist.checkpoint.reader import read_config
from exlm_dist.export.hf.hf_folder import CODE_FILES, export_hf
from exlm_dist.inference.loading import load_model
from exlm_dist.model.stream import Stream
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.tokenizers.tokenizer import MASK, NUM_SPECIAL, PAD


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """The library, which copies the code of a model into a cache of its own before it runs it."""
    import transformers
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", list(sys.path))
        yield transformers


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
            wanted = hidden_states(ours, plain_stream(row))
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


def test_rows_of_padding_and_holes_in_the_attention(exported, transformers):
    model = transformers.AutoModelForMaskedLM.from_pretrained(exported, trust_remote_code=True).eval()
    row, hole = torch.tensor([[0, 7, 4, 8, 2]]), torch.tensor([[0, 7, 9, 4, 8, 2]])
    seen = torch.tensor([[1, 1, 0, 1, 1, 1]])
    alone = model(row).logits
    assert (model(hole, seen).logits[:, seen[0].bool()] - alone).abs().max() < 1e-5
    both = model(torch.cat([row, torch.full_like(row, PAD)]), torch.tensor([[1] * 5, [0] * 5])).logits
    assert (both[:1] - alone).abs().max() < 1e-5 and torch.isfinite(both).all()
    assert torch.isfinite(model(torch.full_like(row, PAD), torch.zeros_like(row)).logits).all()


@pytest.mark.parametrize("name", ["AutoModel", *list(HEADS)[:3]])
def test_embeddings_instead_of_ids(exported, transformers, name):
    model = getattr(transformers, name).from_pretrained(exported, trust_remote_code=True).eval()
    ids, attention = torch.tensor([[0, 7, 6, 8, 2], [0, 9, 2, 1, 1]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    by_ids = model(ids, attention, output_hidden_states=True)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=attention)
    assert torch.equal(by_ids[0], embedded[0]) and len(by_ids.hidden_states) == model.config.num_hidden_layers + 1


@pytest.mark.parametrize("variant", ["exlm", "untied post"])
def test_more_tokens(data, tmp_path, transformers, variant):
    export_hf(make_checkpoint(tmp_path, data, variant), tmp_path / "out")
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    size, ids = model.config.vocab_size, torch.tensor([[0, 7, 4, 8, 2]])
    before = model(ids, output_hidden_states=True).hidden_states[-1]
    model.resize_token_embeddings(size + 3, mean_resizing=False)
    after = model(torch.tensor([[0, 7, 4, size + 2, 2]])).logits
    assert after.shape[-1] == size + 3 and torch.isfinite(after).all()
    assert torch.equal(model(ids, output_hidden_states=True).hidden_states[-1], before)
    tied = model.output.decoder.weight is model.exlm.embedding.weight
    assert tied == (variant == "exlm") and len(model.output.decoder.bias) == model.config.vocab_size == size + 3
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_bfloat16(exported, transformers):
    load = transformers.AutoModelForMaskedLM.from_pretrained
    exact, short = (
        load(exported, trust_remote_code=True).eval(),
        load(exported, trust_remote_code=True, dtype="bfloat16"),
    )
    ids = torch.tensor([[0, 7, 4, 8, 4, 2]])
    found = short.eval()(ids).logits
    assert short.dtype == torch.bfloat16 and found.dtype == torch.float32
    assert (found[0, 2].exp() - exact(ids).logits[0, 2].exp()).abs().max() < 0.05


def test_too_long_a_sequence_is_refused(exported, transformers):
    load = transformers.AutoModelForMaskedLM.from_pretrained
    model = load(exported, trust_remote_code=True).eval()
    with pytest.raises(ValueError, match="max_position_embeddings = 256"):
        model(torch.full((1, 100), MASK))
