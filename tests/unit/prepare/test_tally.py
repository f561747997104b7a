"""Every row is accounted for: kept, a duplicate, or set aside; with too many of the last, nothing is written."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from exlm_dist.prepare import documents
from exlm_dist.prepare.smiles import prepare_smiles
from exlm_dist.prepare.tally import Tally
from exlm_dist.prepare.text import prepare_text
from exlm_dist.tables.records import Row
from exlm_dist.utils.errors import DataError


def test_counts_of_each_file_add_up(tmp_path: Path) -> None:
    """Against a plain count: what is written of each file is known by construction."""
    rng = random.Random(5)
    pool = ["C" * length + "O" for length in range(1, 40)]
    seen: set[str] = set()
    expected = {}
    for name in ("a.smi", "b.csv", "c.txt"):
        rows = [rng.choice([*pool, "bad one", "C1CC", "C" * 90]) for _ in range(200)]
        counts: Counter[str] = Counter()
        for row in rows:
            row = row.split()[0] if name == "a.smi" else row
            kind = "too long" if row == "C" * 90 else "not SMILES" if row in ("bad one", "bad", "C1CC") else ""
            counts[kind or ("duplicates" if row in seen else "kept")] += 1
            seen |= set() if kind else {row}
        expected[name] = counts
        (tmp_path / name).write_text("\n".join((["smiles"] if name == "b.csv" else []) + rows) + "\n\n")
    summary = prepare_smiles(
        [str(tmp_path / name) for name in expected], tmp_path / "o", max_length=64, max_rejected=0.2, workers=2
    )
    statistics = summary.manifest["statistics"]
    for counted in statistics["files"]:
        wanted = expected[counted["name"]]
        assert counted["rows"] == 200 == counted["kept"] + counted["duplicates"] + sum(counted["quarantined"].values())
        found = {**counted["quarantined"], "kept": counted["kept"], "duplicates": counted["duplicates"]}
        assert Counter(found) == wanted
    assert statistics["kept"] == sum(summary.sequences.values()) == len(seen)
    assert len((tmp_path / "o" / "quarantine.tsv").read_text().splitlines()) == 1 + sum(summary.quarantined.values())
    table = summary.table()
    assert "read         600 rows of 3 files" in table and f"c.txt: 200 rows: {expected['c.txt']['kept']} kept" in table


@pytest.mark.parametrize("wrong", [{"reading": 2}, {"keep": 2}, {"duplicate": 2}, {"set_aside": 2}, {"written": 2}])
def test_a_sum_that_is_wrong_is_an_error(tmp_path: Path, wrong: dict[str, int]) -> None:
    with Tally(tmp_path / "q.tsv", 1.0) as tally:
        list(tally.reading(Row("f", n, "x") for n in range(2 + wrong.get("reading", 1))))
        tally.keep("f", wrong.get("keep", 1))
        for _ in range(wrong.get("duplicate", 1)):
            tally.duplicate("f")
        for _ in range(wrong.get("set_aside", 1)):
            tally.set_aside(Row("f", 1, "x"), "why: so")
        with pytest.raises(RuntimeError, match="rows"):
            tally.statistics(wrong.get("written", 1))


@pytest.mark.parametrize("workers", [1, 2])
def test_too_many_rows_set_aside_are_an_error_with_examples_and_advice(tmp_path: Path, workers: int) -> None:
    rows = ["C" * length for length in range(1, 61)]
    rows[7:11] = ["what is this", "C1CC", "N(C)(C)(C)(C)C", "C" * 200]
    (tmp_path / "a.txt").write_text("\n".join(rows))
    call = {"inputs": [str(tmp_path / "a.txt")], "out": tmp_path / "o", "max_length": 100, "workers": workers}
    with pytest.raises(DataError) as caught:
        prepare_smiles(**call)
    message = str(caught.value)
    assert message.startswith("4 of 60 rows (6.7%) cannot be used (2 not SMILES, 1 chemistry, 1 too long), more than")
    assert "row 8: not SMILES: 'what is this'" in message and "row 10: chemistry: " in message
    assert not (tmp_path / "o").exists() and [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    advised = float(message.rsplit("--max-rejected ", 1)[1].rstrip("."))
    assert prepare_smiles(**call, max_rejected=advised).sequences == {"train": 55, "valid": 1}


def test_too_many_of_the_first_rows_end_it_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exlm_dist.prepare.tally.Tally.check_limit.__defaults__", (1000,))
    lines = [json.dumps({"text": f"words of number {n}"} if n % 4 else {"txt": "?"}) for n in range(5000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"250 of the first 1,000 rows \(25.0%\) .*250 no field"):
        prepare_text([str(tmp_path / "a.jsonl")], tmp_path / "o", workers=1, column="text")


def test_a_document_of_any_length_is_encoded_in_parts_that_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefg", k=rng.randint(1, 9))) for _ in range(300)]
    text = " \t".join(rng.choices(words, k=9000)) + "  " + "z" * 300 + "\n" + " ".join(rng.choices(words, k=500))
    (tmp_path / "a.txt").write_text(text)
    first = prepare_text([str(tmp_path / "a.txt")], tmp_path / "a", vocab_size=330, max_length=64, workers=1)
    monkeypatch.setattr(documents, "PART_CHARACTERS", 50)
    second = prepare_text([str(tmp_path / "a.txt")], tmp_path / "b", tokenizer=tmp_path / "a", max_length=64, workers=1)
    assert first.manifest["splits"] == second.manifest["splits"]
    assert first.manifest["statistics"]["words"] == len(text.split())
    parts = list(documents._parts("ab " * 1000 + "c" * 80))
    assert " ".join(parts) == "ab " * 1000 + "c" * 80 and len(parts) > 50
    monkeypatch.setattr(documents, "LONGEST_WORD", 60)
    assert list(documents._parts("c" * 130)) == ["c" * 60, "c" * 60, "c" * 10]


def test_text_without_spaces_trains_a_tokenizer_that_has_its_characters(tmp_path: Path) -> None:
    rng = random.Random(2)
    characters = [chr(0x4E00 + 3 * number) for number in range(300)]
    chinese = ["".join(rng.choices(characters, k=30_000)) for _ in range(3)]
    english = [f"plain words in paragraph {number} again" for number in range(100)]
    for name, parts in (("alone", chinese), ("mixed", chinese + english)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(parts), encoding="utf-8")
        summary = prepare_text([str(tmp_path / f"{name}.txt")], tmp_path / name, vocab_size=900, workers=1)
        assert summary.manifest["statistics"]["byte_tokens"] == 0 and "bytes of characters" not in summary.table()
    (tmp_path / "en.txt").write_text("\n\n".join(english))
    prepare_text([str(tmp_path / "en.txt")], tmp_path / "en", vocab_size=290, workers=1)
    unsuited = prepare_text([str(tmp_path / "alone.txt")], tmp_path / "x", tokenizer=tmp_path / "en", workers=1)
    assert unsuited.manifest["statistics"]["byte_tokens"] > 3 * 80_000
    assert "of the tokens are bytes of characters without a token; a larger --vocab-size" in unsuited.table()


def test_numbers_are_text_and_not_molecules(tmp_path: Path) -> None:
    rng = random.Random(3)
    lines = [" ".join(str(rng.randint(10_000, 10**9)) for _ in range(20)) for _ in range(100)]
    (tmp_path / "n.txt").write_text("\n\n".join(lines))
    assert prepare_text([str(tmp_path / "n.txt")], tmp_path / "o", vocab_size=290, workers=1).sequences["train"] > 20
    (tmp_path / "n.csv").write_text("text\n" + "\n".join(line.split()[0] for line in lines))
    assert prepare_text([str(tmp_path / "n.csv")], tmp_path / "p", vocab_size=290, workers=1).sequences["train"]
