"""prepare_smiles end to end: what comes out, what is set aside, what is refused."""

import json
from pathlib import Path

import pytest
from prepared_folder import files_of, texts_of, verify_folder

from exlm_dist.data.manifest import MANIFEST
from exlm_dist.prepare.demo.drugs import DRUGS
from exlm_dist.prepare.smiles import prepare_smiles
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.utils.errors import DataError

DRUG_LIST = list(DRUGS.values())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "drugs.csv"
    odd = ["OCC", "CCO", "not a molecule", "C(C)(C)(C)(C)C", "", "C" * 130, "Caf\udce9"]
    rows = [f'{number},"{smiles}"' for number, smiles in enumerate([*DRUG_LIST, *odd])]
    path.write_text("id,smiles\n" + "\n".join(rows) + "\n", encoding="utf-8", errors="surrogateescape")
    return path


def test_what_comes_out(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = prepare_smiles([str(source)], out, max_length=120, valid_fraction=0.1, workers=1)
    statistics = summary.manifest["statistics"]
    assert statistics["rows"] == len(DRUG_LIST) + 7 and statistics["duplicates"] == 1
    assert summary.quarantined == {"not SMILES": 1, "chemistry": 1, "empty": 1, "too long": 1, "not UTF-8": 1}
    assert summary.sequences["train"] + summary.sequences["valid"] == len(DRUG_LIST) + 1
    assert summary.sequences["valid"] == round(0.1 * (len(DRUG_LIST) + 1))
    train, valid = texts_of(out, "train"), texts_of(out, "valid")
    assert not set(train) & set(valid) and "CCO" in train + valid and len(set(train)) == len(train)
    lines = (out / "quarantine.tsv").read_text().splitlines()
    assert lines[0] == "file\trow\treason\ttext" and len(lines) == 6
    assert lines[1] == f"{source}\t{len(DRUG_LIST) + 3}\tnot SMILES\tnot a molecule"
    assert "5 (1 chemistry, 1 empty, 1 not SMILES, 1 not UTF-8, 1 too long), see quarantine.tsv" in summary.table()
    histogram = summary.manifest["splits"]["train"]["length_histogram"]
    assert sum(histogram) == summary.sequences["train"] and len(histogram) == 121
    assert verify_folder(out) == [] and not list(tmp_path.glob(".*"))
    policy = load_tokenizer(out).policy
    assert policy["stereo"] == "keep" and policy["salts"] == "keep" and policy["canonical"] is True and policy["rdkit"]


def test_output_does_not_depend_on_workers(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exlm_dist.prepare.smiles.ROWS_PER_TASK", 50)
    prepare_smiles([str(source)], tmp_path / "one", workers=1)
    prepare_smiles([str(source)], tmp_path / "two", workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_held_out_set_depends_on_content_not_on_order(tmp_path: Path) -> None:
    for name, rows in (("a", DRUG_LIST), ("b", DRUG_LIST[::-1])):
        (tmp_path / f"{name}.smi").write_text("\n".join(rows))
        prepare_smiles([str(tmp_path / f"{name}.smi")], tmp_path / name, workers=1)
    assert sorted(texts_of(tmp_path / "a", "valid")) == sorted(texts_of(tmp_path / "b", "valid"))


def test_own_held_out_file_wins_over_training(tmp_path: Path) -> None:
    (tmp_path / "t.smi").write_text("\n".join(DRUG_LIST))
    (tmp_path / "v.smi").write_text("\n".join([*DRUG_LIST[:20], "[Xe]"]))
    summary = prepare_smiles(
        [str(tmp_path / "t.smi")], tmp_path / "o", valid_inputs=[str(tmp_path / "v.smi")], workers=1
    )
    assert summary.sequences == {"train": len(DRUG_LIST) - 20, "valid": 21}
    assert summary.manifest["splits"]["valid"]["unknown_tokens"] >= 1 and summary.unknown_rate > 0
    assert texts_of(tmp_path / "o", "valid")[-1] == "<unk>"


def test_given_tokenizer_brings_its_policy(tmp_path: Path) -> None:
    (tmp_path / "a.smi").write_text("\n".join(DRUG_LIST))
    (tmp_path / "b.smi").write_text("C[C@H](N)C(=O)O\nC[C@@H](N)C(=O)O\nCC[Xe]\nCCC")
    first = prepare_smiles([str(tmp_path / "a.smi")], tmp_path / "a", stereo="drop", workers=1)
    second = prepare_smiles([str(tmp_path / "b.smi")], tmp_path / "b", tokenizer=tmp_path / "a", workers=1)
    assert second.manifest["tokenizer"] == first.manifest["tokenizer"]
    assert second.manifest["policy"]["stereo"] == "drop" and second.manifest["statistics"]["duplicates"] == 1
    assert "CC<unk>" in texts_of(tmp_path / "b", "train") + texts_of(tmp_path / "b", "valid")
    with pytest.raises(DataError, match="stereo = 'keep', but the given tokenizer was made with stereo = 'drop'"):
        prepare_smiles([str(tmp_path / "b.smi")], tmp_path / "c", tokenizer=tmp_path / "a", stereo="keep")
    with pytest.raises(DataError, match="no tokenizer in this folder"):
        prepare_smiles([str(tmp_path / "b.smi")], tmp_path / "c", tokenizer=tmp_path)


def test_text_and_wrong_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("It was the best of times, it was the worst of times.\n\n" * 20)
    with pytest.raises(
        DataError,
        match="20 of 20 rows cannot be read .*t.txt, row 1: 'It was.*looks like text: use `exlm prepare text`",
    ):
        prepare_smiles([str(tmp_path / "t.txt")], tmp_path / "o", workers=1)
    (tmp_path / "t.csv").write_text("name,smiles\naspirin,CCO\nzocor,CCC\n")
    with pytest.raises(DataError, match=r"first: .*t.csv, row 1: 'aspirin'\); is this the right column \(--column\)"):
        prepare_smiles([str(tmp_path / "t.csv")], tmp_path / "o", column="name", workers=1)
    assert not (tmp_path / "o").exists() and not list(tmp_path.glob(".*"))


def test_how_input_was_read_is_part_of_the_request(tmp_path: Path) -> None:
    path = tmp_path / "CID-SMILES"
    path.write_text("".join(f"{number}\tC{'C' * number}O\n" for number in range(50)))
    said = {"column": "2", "format": "tsv", "header": False}
    summary = prepare_smiles([str(path)], tmp_path / "o", workers=1, **said)
    request = summary.manifest["request"]
    assert summary.manifest["statistics"]["rows"] == 50 and {name: request[name] for name in said} == said
    assert "delimiter" not in request and prepare_smiles([str(path)], tmp_path / "o", workers=1, **said).reused
    with pytest.raises(DataError, match="prepared differently .*header: False then, None now"):
        prepare_smiles([str(path)], tmp_path / "o", workers=1, column="2", format="tsv")


def test_rows_that_are_not_well_formed_are_set_aside(tmp_path: Path) -> None:
    lines = [f"{number},C{'C' * number}O" for number in range(60)]
    lines[10], lines[20], lines[30] = '10,"CCC', "20,CCN,x", "30"
    (tmp_path / "a.csv").write_text("id,smiles\n" + "\n".join(lines))
    summary = prepare_smiles([str(tmp_path / "a.csv")], tmp_path / "o", workers=1)
    assert summary.manifest["statistics"]["rows"] == 60 and summary.quarantined == {"ragged": 2, "stray quote": 1}
    assert sum(summary.sequences.values()) == 57
    listed = [line.split("\t") for line in (tmp_path / "o" / "quarantine.tsv").read_text().splitlines()[1:]]
    assert [(row, text) for _, row, _, text in listed] == [("11", '10,"CCC'), ("21", "20,CCN,x"), ("31", "30")]


def test_all_files_are_looked_at_before_the_first_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.smi").write_text("\n".join(DRUG_LIST))
    (tmp_path / "b.csv").write_text("id,name\n1,x\n2,y\n")
    read = []
    monkeypatch.setattr("exlm_dist.prepare.folder.sha256_file", read.append)
    for inputs in ({"inputs": ["a.smi", "b.csv"]}, {"inputs": ["a.smi"], "valid_inputs": ["b.csv"]}):
        paths = {name: [str(tmp_path / file) for file in files] for name, files in inputs.items()}
        with pytest.raises(DataError, match="b.csv: name the column of the smiles"):
            prepare_smiles(out=tmp_path / "o", workers=1, **paths)
    assert not read


def test_hopeless_input_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exlm_dist.prepare.smiles.HOPELESS_ROWS", 600)
    (tmp_path / "t.txt").write_text("some words\n" * 100_000)
    with pytest.raises(DataError, match=r"1,024 of 1,024 rows"):
        prepare_smiles([str(tmp_path / "t.txt")], tmp_path / "o", workers=1)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (["CCO"], {}, r"1 usable sequence\(s\): at least 2"),
        ([""], {}, "the input has no rows"),
        (["", "  "], {}, "the input has no rows"),
        (
            ["CCCCCCCC", "CCCCCCCCC"],
            {"max_length": 5},
            r"none of 2 rows can be used .*too long: 10 tokens, at most 5.*Raise --max-length",
        ),
        (["CCO", "CCC"], {"max_length": 3}, "max_length = 3: must be at least 4"),
        (["CCO", "CCC"], {"valid_fraction": 0.9}, "valid_fraction = 0.9"),
        (["CCO", "CCC"], {"salts": "none"}, "salts = 'none': must be one of keep, largest_fragment"),
    ],
)
def test_input_that_cannot_be_used(tmp_path: Path, rows: list[str], settings: dict, message: str) -> None:
    (tmp_path / "a.smi").write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match=message):
        prepare_smiles([str(tmp_path / "a.smi")], tmp_path / "o", workers=1, **settings)
    assert not (tmp_path / "o").exists()


def test_finished_folder_is_reused_refused_or_replaced(tmp_path: Path) -> None:
    path, out = tmp_path / "a.smi", tmp_path / "o"
    path.write_text("\n".join(DRUG_LIST[:100]))
    first = prepare_smiles([str(path)], out, workers=1)
    before = (out / MANIFEST).stat().st_mtime_ns
    again = prepare_smiles([str(path)], out, workers=1)
    assert (
        again.reused
        and not first.reused
        and "prepared before" in str(again)
        and (out / MANIFEST).stat().st_mtime_ns == before
    )
    with pytest.raises(DataError, match="prepared differently .*max_length: 512 then, 64 now.*--overwrite"):
        prepare_smiles([str(path)], out, max_length=64, workers=1)
    path.write_text("\n".join(DRUG_LIST[:101]))
    with pytest.raises(DataError, match="prepared differently .*inputs: a.smi"):
        prepare_smiles([str(path)], out, workers=1)
    replaced = prepare_smiles([str(path)], out, workers=1, overwrite=True)
    assert not replaced.reused and replaced.manifest["fingerprint"] != first.manifest["fingerprint"]
    assert json.loads((out / MANIFEST).read_text()) == replaced.manifest and not list(tmp_path.glob(".*"))
    next(out.rglob("*.tar")).write_bytes(b"cut")
    with pytest.raises(DataError, match="bytes, .* expected"):
        prepare_smiles([str(path)], out, workers=1)
