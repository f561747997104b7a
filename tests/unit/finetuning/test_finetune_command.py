"""`exlm finetune` and `exlm predict` as a user gives them: what they write, and what they refuse."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from molecule_table import finetune_arguments, molecule_rows, molecules, read_table, write_table
from safetensors.torch import load_file

from exlm_dist.checkpoint.reader import read_config
from exlm_dist.cli import main
from exlm_dist.finetuning.inputs import as_columns, encode_inputs
from exlm_dist.finetuning.prediction import load_finetuned
from exlm_dist.finetuning.splits import PARTS
from exlm_dist.inference.sequences import hidden_states, unmasked_stream
from exlm_dist.model.build import build_model
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.tokenizers.tokenizer import EOS
from exlm_dist.utils.errors import ConfigError


def predicted_by_hand(folder: Path, number: int, smiles: str) -> tuple[float, list[float]]:
    """(probability of the second class of `active`, those of the classes of `kind`) by one member, of one molecule
    alone, with the formula of the head written out."""
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    weights = load_file(folder / f"member-{number}" / "model.safetensors")
    body = build_model(config.model, tokenizer.vocab_size, seed=99).eval()
    names = {name for name, _ in body.named_parameters() if not name.startswith("output.")}
    assert names == {name for name in weights if not name.startswith("head.")}
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
        ids = np.array(tokenizer.encode(smiles))
        vector = hidden_states(body, unmasked_stream(ids, np.array([len(ids)]))).mean(0).double()
        head = {name: value.double() for name, value in weights.items()}
        inner = torch.tanh(head["head.dense.weight"] @ vector + head["head.dense.bias"])
        outputs = head["head.out.weight"] @ inner + head["head.out.bias"]
    return outputs[0].sigmoid().item(), outputs[1:].softmax(0).tolist()


def test_predictions_are_those_of_the_weights_loaded_by_hand(finetuned: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    assert main(["predict", str(finetuned), str(table), "--out", str(out), "--device", "cpu"]) == 0
    predicted = read_table(out)
    assert [row["id"] for row in predicted] == [row["id"] for row in molecule_rows()]
    for row in predicted[:60:13]:
        by_hand = [predicted_by_hand(finetuned, number, row["smiles"]) for number in (0, 1)]
        first, second = np.array([one for one, _ in by_hand]), np.array([many for _, many in by_hand])
        assert float(row["active_probability"]) == pytest.approx(first.mean(), abs=1e-5)
        assert float(row["active_spread"]) == pytest.approx(first.std(ddof=1), abs=1e-5)
        assert row["active_prediction"] == str(int(first.mean() >= 0.5))
        of_kind = [float(row[f"kind_probability_{label}"]) for label in "abc"]
        assert of_kind == pytest.approx(second.mean(0).tolist(), abs=1e-5)
        best = int(second.mean(0).argmax())
        assert row["kind_prediction"] == "abc"[best]
        assert float(row["kind_spread"]) == pytest.approx(second[:, best].std(ddof=1), abs=1e-5)


def test_the_folder_says_how_the_model_was_made(finetuned: Path, checkpoint: Path) -> None:
    record = json.loads((finetuned / "finetuned.json").read_text())
    assert [(one["name"], one["kind"], one["classes"]) for one in record["targets"]] == [
        ("active", "binary", ["0", "1"]),
        ("kind", "multiclass", ["a", "b", "c"]),
    ]
    assert record["split"]["sizes"] == {"train": 36, "valid": 12, "test": 12}
    assert sum(sum(part.values()) for part in record["targets"][0]["counts"].values()) == 60
    assert record["checkpoint"]["path"] == str(checkpoint.resolve()) and record["budget"] == "unit-test"
    assert [member["seed"] for member in record["members"]] == [0, 1]
    scores = [member["test"]["roc_auc"] for member in record["members"]]
    assert record["metrics"]["test"]["roc_auc"] == {
        "mean": pytest.approx(np.mean(scores)),
        "sd": pytest.approx(np.std(scores, ddof=1)),
    }
    split = {row["row"]: row["part"] for row in read_table(finetuned / "split.csv")}
    assert [split[str(number)] for number in range(1, 61)] == [row["part"] for row in molecule_rows()]
    listed = read_table(finetuned / "predictions.csv")
    assert len(listed) == 24 and {row["part"] for row in listed} == {*PARTS[1:]}
    truth = {row["smiles"]: row for row in molecule_rows()}
    assert all(row["active"] == truth[row["smiles"]]["active"] for row in listed)
    assert all(row["kind"] == truth[row["smiles"]]["kind"] for row in listed)
    history = json.loads((finetuned / "member-1" / "history.json").read_text())
    assert [one["epoch"] for one in history] == [1, 2] and history[0]["lr"] > history[1]["lr"] == 0
    assert not (finetuned / "state").exists() and not (finetuned / "failed.tsv").exists()


def test_a_model_needs_no_checkpoint_and_answers_in_python(finetuned: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finetuned, tmp_path / "copy")
    model = load_finetuned(copy, "cpu")
    labels, spread = model.predict(["CCN", "not a molecule", None, "CCO"], return_std=True)
    assert labels.shape == spread.shape == (4, 2)
    assert (labels[[1, 2]] == None).all() and np.isnan(spread[[1, 2]].astype(float)).all()  # noqa: E711
    two, three = model.predict_proba(["CCN", "CCO"])
    assert two.shape == (2, 2) and three.shape == (2, 3)
    assert two.sum(1) == pytest.approx(1) and three.sum(1) == pytest.approx(1)
    with pytest.raises(ConfigError, match="one text where a list"):
        model.predict("CCO")
    (copy / "member-1" / "model.safetensors").write_bytes(b"cut")
    assert main(["predict", str(copy), "x.csv", "--out", str(tmp_path / "p.csv")]) == 78


def test_regression_with_missing_rows_scales_and_lists(checkpoint: Path, tmp_path: Path, capsys) -> None:
    data = molecule_rows()
    data[3]["smiles"], data[4]["length"], data[5]["smiles"] = "C1CC", "", ""
    out = tmp_path / "model"
    arguments = finetune_arguments(checkpoint, write_table(tmp_path / "t.csv", data), out, target="length", seeds=2)
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "rows: 60 read, 57 used, 3 not" in printed and "task: regression" in printed
    failed = (out / "failed.tsv").read_text().splitlines()
    reasons = [line.split("\t")[1:3] for line in failed[1:]]
    assert reasons == [["4", "not SMILES"], ["5", "no label"], ["6", "empty"]]
    record = json.loads((out / "finetuned.json").read_text())
    known = [float(row["length"]) for n, row in enumerate(data) if row["part"] == "train" and n not in (3, 4, 5)]
    assert record["targets"][0]["mean"] == pytest.approx(np.mean(known))
    predictions = tmp_path / "p.jsonl"
    assert main(["predict", str(out), str(tmp_path / "t.csv"), "--out", str(predictions)]) == 0
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert [n for n, row in enumerate(rows) if row["length_mean"] is None] == [3, 5]
    assert all(row["length_spread"] > 0 for n, row in enumerate(rows) if n not in (3, 5))
    assert len((tmp_path / "p.jsonl.failed.tsv").read_text().splitlines()) == 3


def test_several_targets_of_which_labels_are_missing(checkpoint: Path, table: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "model"
    options = {"target": ["active", "partly"], "class_weights": "balanced", "pooling": "first", "epochs": 1}
    assert main(finetune_arguments(checkpoint, table, out, **options)) == 0
    assert "partly (binary)" in (printed := capsys.readouterr().out) and "; 9 missing" in printed
    rows = read_table(out / "predictions.csv")
    assert {row["partly"] for row in rows} == {"0", "1", ""} and all(row["partly_probability"] for row in rows)


def test_pairs_are_one_sequence(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    pairs = [["CCO", "bad", "C" * 40, None], ["c1ccccc1", "CC", "C" * 30, "C"]]
    encoded = encode_inputs(tokenizer, pairs, max_tokens=62)
    wanted = [*tokenizer.encode("CCO"), EOS, *tokenizer.encode("c1ccccc1")]
    assert encoded.rows.tolist() == [0] and encoded.tokens.tolist() == wanted
    assert encoded.failures == {1: "not SMILES", 2: "71 tokens, but the model takes 62 at most", 3: "empty"}
    cut = encode_inputs(tokenizer, pairs, max_tokens=62, truncate=True)
    assert cut.lengths[1] == 62 and cut.truncated == 1
    assert np.flatnonzero(cut.tokens[len(wanted) :] == EOS).tolist() == [31]  # of 61 tokens, 30 are of the shorter one
    data = [
        {"one": one, "two": "CCO" if number % 2 else "CCN", "y": str(number % 2)}
        for number, one in enumerate(molecules(40))
    ]
    out = tmp_path / "model"
    table = write_table(tmp_path / "t.csv", data)
    assert main(finetune_arguments(checkpoint, table, out, target="y", column=["one", "two"], split="random")) == 0
    model = load_finetuned(out, "cpu")
    assert model.inputs == ("one", "two") and model.predict([("CCO", "CCN"), ["C", "CC"]]).shape == (2,)
    assert as_columns([("a", "b")], model.inputs) == [["a"], ["b"]]
    assert main(["predict", str(out), str(table), "--out", str(tmp_path / "p.csv")]) == 0


def test_a_killed_fine_tuning_goes_on_to_the_same_weights(checkpoint: Path, table: Path, tmp_path: Path) -> None:
    options = {"seeds": 2, "epochs": 4, "patience": 0}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(finetune_arguments(checkpoint, table, whole, **options)) == 0
    command = [sys.executable, "-m", "exlm_dist.cli", *finetune_arguments(checkpoint, table, killed, **options)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = tmp_path / "killed.partial" / "state" / "member-1.safetensors"
    end = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert state.exists() and not killed.exists(), "it was killed in the second member"
    assert main(finetune_arguments(checkpoint, table, killed, **options)) == 0
    for number in (0, 1):
        name = f"member-{number}/model.safetensors"
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    assert (whole / "predictions.csv").read_bytes() == (killed / "predictions.csv").read_bytes()
    assert not (tmp_path / "killed.partial").exists()


def test_what_was_begun_with_other_settings_is_refused(checkpoint: Path, table: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "model"
    (tmp_path / "model.partial" / "state").mkdir(parents=True)
    (tmp_path / "model.partial" / "state" / "request.json").write_text(json.dumps({"lr": 0.5}))
    assert main(finetune_arguments(checkpoint, table, out)) == 2
    message = capsys.readouterr().err
    assert "lr was 0.5, now 0.01" in message and f"rm -r {tmp_path / 'model.partial'}" in message
    shutil.rmtree(tmp_path / "model.partial")
    assert main(finetune_arguments(checkpoint, table, out)) == 0
    assert main(finetune_arguments(checkpoint, table, out)) == 2
    assert "exists" in capsys.readouterr().err


BAD = {
    "wrong target": ({"target": "activ"}, 77, r"has no column 'activ' (did you mean 'active'?)"),
    "wrong input": ({"column": "smile"}, 77, r"has no column 'smile' (did you mean 'smiles'?)"),
    "wrong split column": ({"split": ["column", "prt"]}, 77, r"has no column 'prt' (did you mean 'part'?)"),
    "no part": ({"split": ["column", "kind"]}, 77, "the column 'kind' of the split is 'a'"),
    "split": ({"split": ["column"]}, 2, "--split must be scaffold, random, or column NAME"),
    "input as target": ({"target": "smiles"}, 2, "'smiles' is an input"),
    "text": ({"column": "id"}, 77, "60 of 60 rows cannot be read in the column 'id'"),
    "no number": (
        {"target": "kind", "task": "regression"},
        77,
        "row 1: target 'kind' is 'a', which is no finite",
    ),
    "values as classes": ({"target": "length", "task": "classification"}, 77, "say --task regression"),
    "sizes": ({"split": "random", "split_sizes": [0.8, 0.3, 0.1]}, 2, "sum to 1"),
    "empty part": (
        {"split": "random", "split_sizes": [0.998, 0.001, 0.001]},
        77,
        "the valid part of the split is empty",
    ),
    "metric": ({"metric": "rmse"}, 2, "metric = 'rmse' is none of classification"),
    "weights of values": ({"target": "length", "class_weights": "balanced"}, 2, "regression has no classes"),
    "twice": ({"target": ["active", "active"]}, 2, "each once"),
    "rate": ({"lr": 0}, 2, "lr = 0.0"),
    "dropout": ({"dropout": 2}, 2, "dropout = 2.0: must be 0 or more, 0.95 at most"),
    "no checkpoint": ({"checkpoint": "nowhere"}, 78, "nowhere is no folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_say_what_to_do(name: str, checkpoint: Path, table: Path, tmp_path: Path, capsys) -> None:
    options, code, message = BAD[name]
    arguments = {"checkpoint": checkpoint, **options}
    assert main(finetune_arguments(table=table, out=tmp_path / "model", **arguments)) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("active", "1", "target 'active' is '1' in all 60 rows"),
        ("active", "", "target 'active' has no label in any row"),
        ("part", "train", "the valid part of the split is empty"),
    ],
)
def test_bad_tables_say_what_to_do(column, value, message, checkpoint: Path, tmp_path: Path, capsys) -> None:
    table = write_table(tmp_path / "t.csv", [{**row, column: value} for row in molecule_rows()])
    assert main(finetune_arguments(checkpoint, table, tmp_path / "model")) == 77
    assert message in capsys.readouterr().err


def test_several_files_must_have_the_same_columns(checkpoint: Path, table: Path, tmp_path: Path, capsys) -> None:
    data = [{"SMILES" if key == "smiles" else key: value for key, value in row.items()} for row in molecule_rows()]
    arguments = finetune_arguments(checkpoint, table, tmp_path / "model")
    arguments.insert(2, str(write_table(tmp_path / "t.csv", data)))
    assert main(arguments) == 77
    assert "t.csv: its columns are" in capsys.readouterr().err


def test_a_part_of_one_class_is_refused(checkpoint: Path, tmp_path: Path, capsys) -> None:
    data = [{**row, "active": "0" if row["part"] == "valid" else row["active"]} for row in molecule_rows()]
    assert main(finetune_arguments(checkpoint, write_table(tmp_path / "t.csv", data), tmp_path / "model")) == 77
    assert "the valid part of the split (12 rows) has labels of one class only" in capsys.readouterr().err


def test_a_model_is_no_checkpoint_and_must_be_able_to_be_written(
    finetuned: Path, checkpoint: Path, table: Path, tmp_path: Path, capsys
) -> None:
    assert main(finetune_arguments(finetuned, table, tmp_path / "model")) == 78
    assert f"this one was made from {checkpoint}" in capsys.readouterr().err
    assert main(finetune_arguments(checkpoint, table, Path("/proc/new/model"))) == 2
    assert "/proc/new/model: cannot be made: nothing can be written in /proc" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_refused(checkpoint: Path, table: Path, tmp_path: Path, capsys) -> None:
    damaged = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    weights = next(damaged.glob("model-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"oops")
    assert main(finetune_arguments(damaged, table, tmp_path / "model")) == 78
    assert "is damaged: its SHA-256" in capsys.readouterr().err


def test_bad_predictions_say_what_to_do(finetuned: Path, table: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "p.csv"

    def fails(*arguments: object) -> str:
        assert main(["predict", *map(str, arguments), "--out", str(out)]) != 0
        assert not list(tmp_path.glob("*p.csv*"))
        return capsys.readouterr().err

    assert "is no fine-tuned model" in fails(tmp_path, table)
    assert "has no column 'smile'" in fails(finetuned, table, "--column", "smile")
    assert "none of the 60 rows can be read in the column 'id'" in fails(finetuned, table, "--column", "id")
    clash = write_table(tmp_path / "t.csv", [{"smiles": "CCO", "active_probability": "1"}])
    assert "has a column 'active_probability' already" in fails(finetuned, clash)
    (tmp_path / "t.csv").write_text("smiles,id\n")
    assert "there is no row in the data" in fails(finetuned, tmp_path / "t.csv")


@pytest.mark.parametrize(
    "name, target, task, sizes",
    [
        ("bbbp", "p_np", "classification", [1631, 204, 204]),
        ("esol", "measured log solubility in mols per litre", "regression", [902, 113, 113]),
    ],
)
def test_moleculenet_from_end_to_end(
    name: str, target: str, task: str, sizes: list[int], checkpoint: Path, shared: Path, tmp_path: Path, capsys
) -> None:
    data = shared / "data" / "moleculenet" / f"{name}.csv.gz"
    if not data.exists():
        pytest.skip(f"no {data}")
    out, predictions = tmp_path / name, tmp_path / "p.csv"
    options = {"target": [target], "split": "scaffold", "epochs": 1, "batch": 64, "truncate": True}
    assert main(finetune_arguments(checkpoint, data, out, **options)) == 0
    printed = capsys.readouterr().out
    assert f"task: {task}" in printed and "split: scaffold" in printed
    split = json.loads((out / "finetuned.json").read_text())["split"]
    assert [split["sizes"][part] for part in PARTS] == sizes
    assert main(["predict", str(out), str(data), "--out", str(predictions)]) == 0
    predicted = read_table(predictions)
    column = f"{target}_{'mean' if task == 'regression' else 'probability'}"
    for row in read_table(out / "predictions.csv"):
        assert float(predicted[int(row["row"]) - 1][column]) == pytest.approx(float(row[column]), abs=1e-5)
