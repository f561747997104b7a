"""Space that is known to be too little ends a command before its work."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from hf_exports import make_checkpoint
from made_run import make_config, make_data

from exlm_dist.doctor.preflight import check_run
from exlm_dist.export.fairseq import export_fairseq
from exlm_dist.export.hf.hf_folder import export_hf
from exlm_dist.prepare.text import prepare_text
from exlm_dist.utils.errors import OutputError
from exlm_dist.utils.outputs import check_space


def test_the_limit_itself_suffices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=900))
    check_space(tmp_path / "a/b", 900, "it")
    with pytest.raises(OutputError, match=f"b: it takes 0.0 MB, and 0.0 MB are free in {tmp_path}"):
        check_space(tmp_path / "a/b", 901, "it")


def test_text_exports_and_a_new_run_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, corpus = make_data(tmp_path / "data"), tmp_path / "corpus.txt"
    corpus.write_text("a few words of prose\n\n" * 100)
    checkpoint, config = make_checkpoint(tmp_path, data), make_config(tmp_path / "runs", "run", data)
    check_run(config)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2000))
    out = tmp_path / "out"
    for work, what in (
        (lambda: prepare_text([str(corpus)], out, workers=1), "the text of the input alone"),
        (lambda: export_hf(checkpoint, out), "the export"),
        (lambda: export_fairseq(checkpoint, out), "the export"),
        (lambda: check_run(config), "a single checkpoint of this model"),
    ):
        with pytest.raises(OutputError, match=f"{what} takes .* 0.0 MB are free in {tmp_path}.*another file system"):
            work()
    assert not out.exists()
