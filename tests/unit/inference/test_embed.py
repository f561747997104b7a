"""Embeddings: the same vectors as one sequence at a time, rows in order, failures null and listed."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from made_run import MOLECULES, make_config, make_data, make_run

import exlm_dist
from exlm_dist.cli import main
from exlm_dist.inference import embed_file as module
from exlm_dist.inference.embed import POOLINGS, embed_texts
from exlm_dist.inference.embed_file import embed_file
from exlm_dist.inference.loading import choose_device, load_checkpoint
from exlm_dist.inference.sequences import hidden_states, length_batches, take_sequences, unmasked_stream
from exlm_dist.tables.records import InputOptions
from exlm_dist.tokenizers.encoding import encode_texts
from exlm_dist.tokenizers.molecules import canonical_smiles
from exlm_dist.tokenizers.tokenizer import BOS, EOS
from exlm_dist.utils.errors import CheckpointError, ConfigError, DataError


@pytest.fixture(scope="module", params=["exlm", "mlm"])
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    data = make_data(folder / "data")
    config = make_config(folder, "run", data, request.param)
    config = config.model_copy(update={"model": config.model.model_copy(update={"layers": 2})})
    return load_checkpoint(make_run(config))


def by_definition(loaded, smiles: str, pooling: str, layer: int | None) -> np.ndarray:
    """One molecule alone, its hidden states collected by hooks from a run of all layers."""
    ids = np.array(loaded.tokenizer.encode(canonical_smiles(smiles, loaded.tokenizer.policy)))
    stream = unmasked_stream(ids, np.array([len(ids)])).replace(select=False)
    assert stream.input_ids.tolist() == [BOS, *ids, EOS] and not stream.clone.any()
    states = []
    with torch.no_grad():
        for part in loaded.model.layers[:-1]:
            stream = part(stream)
            states.append(stream.hidden)
    hidden = states[-1 if layer is None else layer]
    return {"mean": hidden.mean(0), "first": hidden[0], "max": hidden.amax(0)}[pooling].numpy()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("layer", [None, 0, 1, 2])
def test_each_vector_is_that_of_the_molecule_alone(loaded, pooling, layer):
    result = embed_texts(loaded, MOLECULES, pooling=pooling, layer=layer)
    assert result.vectors.dtype == np.float32 and not result.failures
    for smiles, vector in zip(MOLECULES, result.vectors):
        np.testing.assert_allclose(vector, by_definition(loaded, smiles, pooling, layer), atol=1e-5)


def test_other_spellings_of_a_molecule_give_its_vector(loaded):
    vectors = embed_texts(loaded, ["OC(=O)c1ccccc1O", "c1ccc(O)c(C(=O)O)c1"]).vectors
    np.testing.assert_array_equal(vectors[0], vectors[1])


def test_what_cannot_be_used_is_nan_with_a_reason(loaded, caplog):
    long = "C" * 300
    texts = ["CCO", None, "xyz", "  ", long, "C[N](C)(C)(C)C", "CBr", "\udcff"]
    result = embed_texts(loaded, texts)
    assert sorted(result.failures) == [1, 2, 3, 4, 5, 7]
    assert result.failures[2] == "not SMILES" and result.failures[4] == "300 tokens, but the model takes 254 at most"
    assert result.failures[1] == result.failures[3] == "empty" and result.failures[7] == "not UTF-8"
    assert result.failures[5].startswith("chemistry: Explicit valence")
    assert np.isnan(result.vectors[[1, 2, 3, 4, 5, 7]]).all() and np.isfinite(result.vectors[[0, 6]]).all()
    assert result.unknown == 1  # Br
    cut = embed_texts(loaded, [long], truncate=True)
    assert cut.truncated == 1
    np.testing.assert_allclose(cut.vectors, embed_texts(loaded, ["C" * 254]).vectors, atol=1e-6)
    exlm_dist.load(loaded.folder).embed(texts)
    assert "6 of 8 texts cannot be used; the first is number 1: empty" in caplog.text


def test_batches_cover_everything_once_within_their_limit():
    lengths = np.random.default_rng(0).integers(0, 60, 500)
    batches = list(length_batches(lengths, 128))
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert all((lengths[batch] + 2).sum() <= 128 for batch in batches)
    assert (np.diff([lengths[batch].max() for batch in batches]) <= 0).all()
    assert [batch.tolist() for batch in length_batches(np.array([3, 900, 4]), 128)] == [[1], [2, 0]]
    tokens = np.arange(lengths.sum())
    chosen = np.array([7, 0, 499])
    taken, counts = take_sequences(tokens, lengths, chosen)
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    assert taken.tolist() == np.concatenate([parts[i] for i in chosen]).tolist() and (counts == lengths[chosen]).all()


def test_hidden_states_carry_gradients(loaded):
    tokens = encode_texts(loaded.tokenizer, MOLECULES[:2], max_tokens=99)
    hidden = hidden_states(loaded.model, unmasked_stream(tokens.tokens, tokens.lengths))
    (gradient,) = torch.autograd.grad(hidden.sum(), loaded.model.embedding.weight)
    assert hidden.shape == (tokens.lengths.sum() + 4, 16) and gradient.abs().sum() > 0


@pytest.fixture
def table(tmp_path):
    """A csv with two molecules that cannot be used, one of which is not even a row."""
    path = tmp_path / "m.csv"
    path.write_text("id,smiles,note\n1,CCO,a\n2,xyz,b\n3,c1ccccc1,\n4,,d\n")
    return path


@pytest.mark.parametrize("chunk", [2, 2048])
def test_a_file_keeps_order_and_columns(loaded, table, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    out = tmp_path / "out.csv"
    result = embed_file(loaded, [str(table)], out, options=InputOptions(), workers=1)
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["smiles"], row["note"]) for row in rows] == [
        ("1", "CCO", "a"),
        ("2", "xyz", "b"),
        ("3", "c1ccccc1", ""),
        ("4", "", "d"),
    ]
    expected = embed_texts(loaded, ["CCO", "c1ccccc1"]).vectors
    for index, vector in ((0, expected[0]), (2, expected[1])):  # other batches are added up in another order
        found = [float(rows[index][f"embedding_{i}"]) for i in range(16)]
        np.testing.assert_allclose(found, vector, rtol=0, atol=1e-6 * np.abs(vector).max())
    assert all(rows[index][f"embedding_{i}"] == "" for index in (1, 3) for i in range(16))
    listed = (tmp_path / "out.csv.failed.tsv").read_text().splitlines()
    assert [line.split("\t")[1:] for line in listed[1:]] == [["2", "not SMILES", "xyz"], ["4", "empty", ""]]
    assert (result.rows, result.failed) == (4, 2) and "2 failed" in str(result)


def test_worker_processes_change_nothing(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 3)
    rows = tmp_path / "m.smi"
    rows.write_text("\n".join([*MOLECULES, "not-a-molecule"]) + "\n")
    for workers in (1, 2):
        embed_file(loaded, [str(rows)], tmp_path / f"{workers}.npz", options=InputOptions(), workers=workers)
    one, two = (np.load(tmp_path / f"{workers}.npz") for workers in (1, 2))
    assert one["smiles"].tolist() == [*MOLECULES, "not-a-molecule"]
    for name in ("smiles", "embedding"):
        np.testing.assert_array_equal(one[name], two[name])


def test_the_command(loaded, table, tmp_path, capsys):
    arguments = ["embed", str(table), "--checkpoint", str(loaded.folder), "--out", str(tmp_path / "o.jsonl")]
    assert main([*arguments, "--pooling", "max", "--device", "cpu"]) == 0
    assert "2 of 4 rows embedded" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "exists. Choose another name, or replace it with --overwrite." in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--layer", "9"]) == 2
    assert "layer 9: must be from 0 (token embeddings) to 2 (the last block)." in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_nothing_half_written(number, tmp_path):
    make_run(make_config(tmp_path, "run", make_data(tmp_path / "data")))
    (tmp_path / "many.smi").write_text("".join(f"{'C' * (n % 40 + 1)}O\n" for n in range(400_000)))
    out = tmp_path / "out"
    out.mkdir()
    embed = ["embed", str(tmp_path / "many.smi"), "--checkpoint", str(tmp_path / "run"), "--workers", "1"]
    command = [sys.executable, "-m", "exlm_dist.cli", *embed, "--out", str(out / "x.csv")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while not list(out.glob(".x.csv.*")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert "Traceback" not in said
    assert not list(out.iterdir())


def test_nothing_is_written_where_nothing_can_be_used(loaded, table, tmp_path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"none of the 4 rows can be used .*not SMILES.*'note'; choose another with"):
        embed_file(loaded, [str(table)], tmp_path / "o.csv", options=InputOptions(column="note"))
    with pytest.raises(DataError, match="no column 'smile'.*did you mean 'smiles'"):
        embed_file(loaded, [str(table)], tmp_path / "o.csv", options=InputOptions(column="smile"))
    with pytest.raises(ConfigError, match="pooling 'sum': must be one of mean, first, max"):
        embed_file(loaded, [str(table)], tmp_path / "o.csv", options=InputOptions(), pooling="sum")
    assert sorted(tmp_path.iterdir()) == before
    other = tmp_path / "other.csv"
    other.write_text("smiles\nCC\n")
    with pytest.raises(ConfigError, match="take them one by one"):
        embed_file(loaded, [str(table), str(other)], tmp_path / "o.csv", options=InputOptions())
    clash = tmp_path / "clash.csv"
    clash.write_text("smiles,embedding\nCC,1\n")
    with pytest.raises(ConfigError, match="has a column 'embedding' already"):
        embed_file(loaded, [str(clash)], tmp_path / "o.csv", options=InputOptions())


def test_loading_says_what_is_wrong(tmp_path):
    with pytest.raises(CheckpointError, match="is no folder"):
        exlm_dist.load(tmp_path / "none")
    with pytest.raises(ConfigError, match="device 'gpu' cannot be used here"):
        choose_device("gpu")
