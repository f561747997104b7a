"""`benchmarks/train_cpu_transformers.py`: the sides train on the same tokens and masks, and are of one size."""

from __future__ import annotations

import csv

import pytest
import torch
from locations import ROOT


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import train_cpu_transformers

    return train_cpu_transformers


def options(module, monkeypatch, *words: str):
    sizes = "--layers 2 --width 64 --heads 2 --sequences 6 --rounds 2".split()
    monkeypatch.setattr("sys.argv", ["train_cpu_transformers.py", *words, *sizes])
    return module.options()


def test_transformers_sees_the_tokens_and_masks_of_our_batches(module, monkeypatch):
    args = options(module, monkeypatch, "smiles", "--grouped")
    for batch in module.batches(args, module.Source("smiles", None)):
        plain, inputs = batch["plain"], module.padded(batch["plain"])
        inside = inputs["attention_mask"].bool()
        assert inputs["input_ids"][inside].tolist() == plain.input_ids.tolist()
        assert not inputs["input_ids"][~inside].ne(module.PAD).any()
        labels = inputs["labels"][inside]
        assert labels[labels != module.IGNORED].tolist() == plain.target_ids.tolist()
        assert (labels != module.IGNORED).nonzero()[:, 0].tolist() == plain.state_index.tolist()
        assert (inputs["labels"][~inside] == module.IGNORED).all()
        masked = batch["exlm"].target_ids[batch["exlm"].is_masked]
        assert masked.tolist() == plain.target_ids.tolist()
        longest = inside.sum(1)
        assert longest.max() - longest.min() <= 4  # sorted before they were cut into batches


def test_a_run_of_all_sides_at_toy_size(module, monkeypatch, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    args = options(module, monkeypatch, "text", "--out", str(tmp_path), "--threads", str(torch.get_num_threads()))
    monkeypatch.setattr(module, "options", lambda: args)
    module.main()
    (table,) = tmp_path.glob("*.csv")
    rows = {row["side"]: row for row in csv.DictReader(table.open())}
    assert tuple(rows) == module.SIDES
    assert len({row["transformers"] for row in rows.values()}) == 1
    sizes = [int(rows[side]["parameters"]) for side in ("plain", "modernbert")]
    assert max(sizes) < 1.05 * min(sizes)
    assert all(abs(float(row["first_loss"]) - 9.01) < 0.3 for row in rows.values())  # log 8192
