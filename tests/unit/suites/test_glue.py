"""The suite glue: files as people have them, one table of nine tasks, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_text import make_glue, make_text_data, make_text_run, sentences, write_lines

from exlm_dist.cli import main
from exlm_dist.finetuning.targets import Target
from exlm_dist.suites.bag_of_words import predict_from_words
from exlm_dist.suites.cells import read_results
from exlm_dist.suites.glue import GLUE
from exlm_dist.suites.methods import find_methods
from exlm_dist.suites.moleculenet import MOLECULENET
from exlm_dist.suites.task_data import TaskData
from exlm_dist.utils.errors import ConfigError, DataError

SHARED = Path(os.environ.get("EXLM_SHARED", "nowhere")) / "data" / "glue"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_run(tmp_path_factory.mktemp("text-run"))


@pytest.fixture
def glue(tmp_path: Path) -> Path:
    return make_glue(tmp_path / "glue")


def read(name: str, folder: Path) -> TaskData:
    task = GLUE.task(name)
    found = [path for path in task.find(folder).values() if path is not None]
    return task.read(tuple(found))


def command(run: Path, glue: Path, *more: str) -> list[str]:
    return [
        *("evaluate", "glue", "--checkpoint", str(run), "--data", str(glue), "--out", str(glue.parent / "out")),
        *("--protocol", "quick", "--grid", "epochs=1", "lr=0.01", "--seeds", "1", "--jobs", "1", "--device", "cpu"),
        *more,
    ]


def test_one_table_has_nine_tasks_and_averages_eight(run: Path, glue: Path) -> None:
    assert main(command(run, glue, "--frozen")[:4] + ["bag-of-words", *command(run, glue, "--frozen")[4:]]) == 0
    out = glue.parent / "out"
    page = (out / "report" / "report.md").read_text()
    rows = [line.split(" | ")[:3] for line in page.splitlines() if line.startswith("| ")]
    tasks = [(row[0].strip("| "), row[1]) for row in rows[2:16]]
    assert tasks == [
        *(("cola", "mcc"), ("cola", "accuracy"), ("sst2", "accuracy"), ("mrpc", "accuracy"), ("mrpc", "f1")),
        *(("stsb", "spearman"), ("stsb", "pearson"), ("qqp", "accuracy"), ("qqp", "f1"), ("mnli", "accuracy")),
        *(("mnli mismatched", "accuracy"), ("qnli", "accuracy"), ("rte", "accuracy"), ("wnli", "accuracy")),
    ]
    assert "bag-of-words, linear | tiny_text@100 | tiny_text@100 frozen |" in page
    (mean,) = [line for line in page.splitlines() if line.startswith("| mean of")]
    assert mean.startswith("| mean of 8 | mcc, accuracy, spearman |"), "WNLI is not in it"
    assert "Validation part, as the labels of the test part are hidden" in page and "test rows" not in page
    assert "What differs there from the protocol: pooling mean, lr 0.001" in page
    (constant,) = [line for line in page.splitlines() if line.startswith("Always the same answer reaches")]
    cola = read("cola", glue)
    trained, shown = (cola.labels[cola.official[part], 0] for part in ("train", "valid"))
    expected = f": cola {np.mean(shown == (trained.mean() > 0.5)):.3f} (commonest class), sst2 "
    assert expected in constant and "mnli mismatched " in constant
    results, failures = read_results(out)
    assert len(results) == 27 and not failures
    (mnli,) = [one for one in results if one["task"] == "mnli" and one["method"]["frozen"]]
    assert set(mnli["scores"]) == {"valid", "mismatched"}
    assert mnli["scores"]["valid"] == mnli["scores"]["mismatched"], "the two files are the same here"
    with open(out / "report" / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    shown = {row["mean"] for row in table if (row["task"], row["metric"]) == ("cola", "mcc")}
    own = [one["scores"]["valid"]["mcc"] for one in results if one["task"] == "cola"]
    assert {float(value) for value in shown} == set(own) and all(row["median"] == row["mean"] for row in table)
    assert not list((out / "splits").iterdir()), "the files say what the parts are"


def test_protocols_are_those_that_are_published() -> None:
    protocols = GLUE.task("mrpc").protocols
    assert set(protocols) == {"coco", "dinky", "roberta", "quick"} == set(GLUE.protocols)
    coco, dinky, roberta = (protocols[name] for name in ("coco", "dinky", "roberta"))
    assert (coco.lr, coco.batch, coco.epochs, coco.weight_decay) == (4e-5, 16, 10, 0.01)
    assert (dinky.keep, dinky.weight_decay, dinky.clip) == ("last", 0.1, 0.0) and coco.keep == "best"
    assert (roberta.lr, roberta.pooling) == (1e-5, "first") and GLUE.task("rte").protocols["roberta"].lr == 2e-5
    assert GLUE.task("mnli").protocols["coco"].epochs == 2 and GLUE.task("mnli").protocols["coco"].batch == 32


def test_quotes_are_ordinary_characters_and_unusable_rows_are_counted(glue: Path) -> None:
    rows = [["x", n % 2, "", text] for n, text in enumerate(sentences()[:10])]
    rows[3][3], rows[4][3] = '"He said', 'no " end" of it'
    rows[5][3], rows[6][1] = "", ""
    write_lines(glue / "CoLA" / "train.tsv", rows)
    data = read("cola", glue)
    assert data.columns["sentence1"][3:5] == ['"He said', 'no " end" of it'] and len(data.official["train"]) == 8
    assert [(row.row, row.reason) for row in data.failed] == [(6, "empty"), (7, "no label")]
    assert data.described()["rows"] == {"read": 22, "used": 20}


def test_tables_of_the_hub_are_the_same_data(glue: Path, tmp_path: Path) -> None:
    """JSON lines or parquet, classes by their numbers, other names of parts and columns."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    plain = read("mnli", glue)
    first, second = plain.columns.values()
    hub = tmp_path / "hub" / "mnli"
    hub.mkdir(parents=True)
    names = {"train": "train-00000-of-00001", "valid": "validation_matched-00000-of-00001"}
    for part, rows in plain.official.items():
        table = [
            {"premise": first[row], "hypothesis": second[row], "label": int(plain.labels[row, 0]), "idx": int(row)}
            for row in rows
        ]
        if part in names:
            parquet.write_table(pyarrow.Table.from_pylist(table), hub / f"{names[part]}.parquet")
        else:
            (hub / "validation_mismatched.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    other = read("mnli", tmp_path / "hub")
    assert other.columns == plain.columns and (other.labels == plain.labels).all()
    assert all((other.official[part] == rows).all() for part, rows in plain.official.items())
    assert plain.targets == (Target("label", "multiclass", ("entailment", "neutral", "contradiction")),)


@pytest.mark.parametrize(
    ("task", "file", "rows", "message"),
    [
        ("cola", "CoLA/dev.tsv", [["g", 2, "", "a b"], ["g", 1, "", "c"]], "row 1: the label .* is '2'; .* are 0, 1"),
        ("cola", "CoLA/dev.tsv", [["g", 1], ["g", 0]], "has no column 4, which cola has. Its columns: '1', '2'"),
        ("stsb", "STS-B/dev.tsv", [["sentence1", "sentence2", "score"], ["a", "b", "5.5"]], "from 0 to 5"),
        ("rte", "RTE/dev.tsv", [["sentence1", "sentence2", "label"], ["a", "b", "-1"]], "a label that is hidden"),
        ("rte", "RTE/dev.tsv", [["sentence1", "sentence2"], ["a", "b"]], "no column label, which rte has"),
        ("rte", "RTE/dev.tsv", [["sentence1", "sentence2", "label"], *[["a", "b", 0]] * 2], "labels of one class"),
        ("rte", "RTE/dev.tsv", [["sentence1", "sentence2", "label"], ["a", "", 0]], "1 of 1 rows cannot be used"),
    ],
)
def test_files_of_another_form_are_refused(task: str, file: str, rows: list, message: str, glue: Path) -> None:
    write_lines(glue / file, rows)
    with pytest.raises(DataError, match=message):
        read(task, glue)


def test_what_cannot_be_judged_is_said_at_once(
    run: Path, runs: tuple[Path, Path], glue: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (glue / "QNLI" / "train.tsv").unlink()
    assert main(command(run, glue, "--tasks", "qnli")) == 77
    assert "has no file for qnli (looked for QNLI/train.tsv, compressed or not)" in capsys.readouterr().err
    shutil.copy(glue / "RTE" / "dev.tsv", glue / "RTE" / "validation.tsv")
    assert main(command(run, glue, "--tasks", "rte")) == 77
    assert "could each be its file" in capsys.readouterr().err
    assert main([*command(run, glue)[:3], "fingerprints", *command(run, glue)[3:]]) == 2
    assert "fingerprints is a baseline of the suite moleculenet, not of glue" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="reads texts, but the suite moleculenet has molecules"):
        find_methods([str(run)], MOLECULENET, frozen=False)
    with pytest.raises(ConfigError, match="reads molecules, but the suite glue has texts. Give another checkpoint"):
        find_methods([str(runs[0])], GLUE, frozen=False)


def test_another_tokenizer_in_a_checkpoint_is_found_out(
    run: Path, glue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(run, tmp_path / "other")
    tokenizer = own / "checkpoints" / "step-00000100" / "tokenizer"
    shutil.rmtree(tokenizer)
    shutil.copytree(make_text_data(tmp_path / "data", vocab_size=285) / "tokenizer", tokenizer)
    assert main(command(own, glue, "--tasks", "rte")) != 0
    assert "tokenizer" in capsys.readouterr().err


def test_a_bag_of_words_learns_what_words_show() -> None:
    texts = [f"{'good' if n % 2 else 'bad'} film number {n}" for n in range(60)]
    parts = {"train": np.arange(40), "valid": np.arange(40, 60)}
    target = Target("label", "binary", ("0", "1"))
    labels = np.array([[float(n % 2)] for n in range(60)])
    found = predict_from_words("linear", [texts], labels, [target], parts, seed=0, threads=1)
    assert set(found) == {"valid"} and ((found["valid"] > 0.5) == labels[40:]).all()
    three = Target("label", "multiclass", ("a", "b", "c"))
    found = predict_from_words("linear", [texts, texts[::-1]], labels, [three], parts, seed=0, threads=1)
    assert found["valid"].shape == (20, 3) and np.allclose(found["valid"].sum(axis=1), 1)
    assert not found["valid"][:, 2].any(), "a class that the training part lacks"
    values = np.array([[float(len(text))] for text in texts])
    found = predict_from_words("linear", [texts], values, [Target("n", "regression")], parts, seed=0, threads=1)
    assert found["valid"].shape == (20, 1) and np.isfinite(found["valid"]).all()


@pytest.mark.parametrize(
    ("name", "train", "dev", "first"),
    [
        ("cola", (2528, 6023), (322, 721), "Our friends won't buy this analysis, let alone the next one we propose."),
        ("rte", (1249, 1241), (146, 131), "No Weapons of Mass Destruction Found in Iraq Yet."),
        ("mrpc", (1194, 2474), (129, 279), 'Amrozi accused his brother , whom he called " the witness " , of'),
    ],
)
@pytest.mark.skipif(not SHARED.is_dir(), reason="EXLM_SHARED names no folder with data/glue")
def test_the_real_files_are_read_whole(name: str, train: tuple[int, int], dev: tuple[int, int], first: str) -> None:
    data = read(name, SHARED)
    assert not data.failed and data.columns["sentence1"][0].startswith(first)
    for part, counts in (("train", train), ("valid", dev)):
        assert tuple(np.bincount(data.labels[data.official[part], 0].astype(int))) == counts
