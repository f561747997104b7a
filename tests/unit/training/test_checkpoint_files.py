"""Checkpoints on disk: whole or not there, every damage found, thinned out without losing the last good one."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exlm_dist.model import checkpoint_reader as reader
from exlm_dist.training import checkpoint_files as files
from exlm_dist.utils.errors import CheckpointError


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "b.weight": torch.randn(3, 5, generator=generator),
        "a": torch.randn(7, generator=generator),
        "empty": torch.zeros(0, 2),
        "scalar": torch.tensor(-0.0),
        "t": torch.randn(4, 6, generator=generator).t(),
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    return tmp_path / "run"


def save(run: Path, step: int, nll: float | None = None, seed: int = 0) -> Path:
    evaluation = None if nll is None else {"nll": nll}
    return files.write_checkpoint(
        run,
        step,
        model=tensors(seed),
        optimizer=tensors(seed + 1),
        state={"step": step, "evaluation": evaluation},
        config="name: x\n",
        tokenizer=run.parent / "tokenizer",
    )


def test_what_is_written_is_read(run):
    folder = save(run, 12)
    assert folder.name == "step-00000012" and reader.verify(folder)["step"] == 12
    for name, value in reader.load_weights(folder).items():
        assert (
            value.dtype == torch.float32
            and torch.equal(value, tensors()[name])
            and value.shape == tensors()[name].shape
        )
    assert torch.signbit(reader.load_weights(folder)["scalar"])
    assert set(load_file(folder / "optimizer.safetensors")) == set(tensors())
    assert (run / "checkpoints/latest").read_text() == "step-00000012\n"
    assert (folder / "tokenizer/tokenizer.json").read_text() == "{}" and (
        folder / "config.yaml"
    ).read_text() == "name: x\n"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-00000012"]


def test_any_flipped_bit_is_found(run):
    folder = save(run, 1)
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    assert len(names) == 7
    for name in names:
        content = (folder / name).read_bytes()
        for place in {0, len(content) // 2, len(content) - 1}:
            for bit in (0x01, 0x80):
                changed = bytearray(content)
                changed[place] ^= bit
                (folder / name).write_bytes(changed)
                with pytest.raises(CheckpointError):
                    reader.verify(folder)
        (folder / name).write_bytes(content[:-1])
        with pytest.raises(CheckpointError):
            reader.verify(folder)
        (folder / name).unlink()
        with pytest.raises(CheckpointError):
            reader.verify(folder)
        (folder / name).write_bytes(content)
    reader.verify(folder)


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_a_save_that_fails_anywhere_leaves_the_older_one(run, monkeypatch, call):
    """Every fsync, rename and replace of a save fails in turn: the state before it, or the new one, never a part."""
    save(run, 1)
    plain = getattr(os, call)
    for number in range(1, 30):
        shutil.rmtree(files.folder_of(run, 2), ignore_errors=True)
        calls = []

        def failing(*arguments, number=number, calls=calls, **keywords):
            calls.append(arguments)
            if len(calls) == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return plain(*arguments, **keywords)

        monkeypatch.setattr(os, call, failing)
        try:
            save(run, 2)
        except files.DiskFull as error:
            assert "step 2" in str(error) and "No space left" in str(error)
        monkeypatch.setattr(os, call, plain)
        assert not list((run / "checkpoints").glob(".tmp*"))
        assert reader.step_of(reader.newest_checkpoint(run)) in (1, 2)
        if len(calls) < number:
            assert number > 1
            return
    pytest.fail("a save does not end")


def test_no_room_is_seen_before(run, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(files.DiskFull, match=r"needs 17 MB but only 1 MB are free .*untouched"):
        save(run, 1)
    assert not list((run / "checkpoints").iterdir())


def test_a_damaged_folder_of_the_same_step_is_replaced(run):
    folder = save(run, 3)
    (folder / "COMPLETE").unlink()
    save(run, 3, seed=5)
    assert torch.equal(reader.load_weights(folder)["a"], tensors(5)["a"])


def test_retention_keeps_the_newest_and_the_best(run):
    for step, nll in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 1.5)):
        save(run, step, nll)
        files.retain(run, keep=2, best=True)
    assert [reader.step_of(folder) for folder in reader.checkpoint_folders(run)] == [5, 4, 2]
    assert [folder.name for folder in files.retain(run, keep=1, best=False)] == ["step-00000004", "step-00000002"]
    assert files.has_whole(run)


def test_retention_counts_whole_ones_only(run):
    for step in (1, 2, 3):
        save(run, step)
    (files.folder_of(run, 3) / "COMPLETE").unlink()
    files.retain(run, keep=1, best=True)
    assert [reader.step_of(folder) for folder in reader.checkpoint_folders(run)] == [3, 2]
    assert reader.newest_checkpoint(run) == files.folder_of(run, 2)


def test_clean_removes_what_killed_saves_left(run):
    save(run, 1)
    for name in (".tmp-step-00000002-77", ".trash-step-00000000-77"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "model.safetensors").write_text("part")
    (run / "checkpoints/.latest.77.tmp").write_text("s")
    files.clean(run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-00000001"]
