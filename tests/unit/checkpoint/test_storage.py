"""Checkpoints on disk: whole or not there, every damage found, old ones removed without losing the last good one."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from safetensors.numpy import load_file

from exlm_dist.checkpoint import rank_files, reader, storage
from exlm_dist.checkpoint.pieces import Piece, Slice
from exlm_dist.checkpoint.tensors import TensorReader
from exlm_dist.utils.checkpoint_names import checkpoint_folder
from exlm_dist.utils.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")
#: What a save calls, and the removal of the checkpoint before it.
CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "b.weight": generator.standard_normal((3, 5), np.float32),
        "a": generator.standard_normal(7, np.float32),
        "empty": np.zeros((0, 2), np.float32),
        "scalar": np.float32(-0.0).reshape(()),
        "t": generator.standard_normal((6, 4), np.float32).T,
    }


def moments(seed: int) -> dict[str, np.ndarray]:
    return {
        f"{moment}.{name}": value
        for number, moment in enumerate(MOMENTS)
        for name, value in tensors(seed + 100 * number).items()
    }


def by_two(shape: tuple[int, ...]) -> list[Piece]:
    """Two tensor-parallel halves along the last dimension, the second of which belongs to two ranks."""
    if len(shape) < 2:
        return [Piece(None, 0, int(np.prod(shape)), 1)]
    dim, half = len(shape) - 1, shape[-1] // 2
    first, second = Slice(dim, 0, half), Slice(dim, half, shape[-1])
    rest = int(np.prod(shape[:-1])) * (shape[-1] - half)
    cut = rest // 3
    return [
        Piece(first, 0, int(np.prod(shape[:-1])) * half, 0),
        Piece(second, 0, cut, 1),
        Piece(second, cut, rest, 2),
    ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    return tmp_path / "run"


def save(run: Path, step: int, nll: float | None = None, seed: int = 0, tokens: float = 9.0, **how) -> Path:
    evaluation = None if nll is None else {"nll": nll, "tokens": tokens}
    return write_checkpoint(
        run,
        step,
        model=tensors(seed),
        optimizer=moments(seed + 1),
        state={"step": step, "evaluation": evaluation},
        config="name: x\n",
        tokenizer=run.parent / "tokenizer",
        **how,
    )


def same(folder: Path, seed: int) -> bool:
    """Whether parameters and moments are those of `save(seed=seed)` to the last bit."""
    found = {**reader.load_weights(folder), **reader.load_optimizer(folder)}
    wanted = {**tensors(seed), **moments(seed + 1)}
    return found.keys() == wanted.keys() and all(
        found[name].shape == value.shape and found[name].numpy().tobytes() == value.tobytes()
        for name, value in wanted.items()
    )


def test_what_is_written_is_read(run):
    folder = save(run, 12)
    assert folder.name == "step-00000012" and reader.verify(folder)["step"] == 12
    assert same(folder, 0)
    assert np.signbit(reader.load_weights(folder)["scalar"].numpy())
    assert (run / "checkpoints/latest").read_text() == "step-00000012\n"
    assert (folder / "tokenizer/tokenizer.json").read_text() == "{}" and (
        folder / "config.yaml"
    ).read_text() == "name: x\n"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-00000012"]


def test_the_files_of_one_rank_are_ordinary_safetensors(run):
    folder = save(run, 1)
    found = load_file(folder / "model-00000.safetensors")
    for name, value in tensors().items():
        assert np.array_equal(found[name], value) and found[name].shape == value.shape
    assert set(load_file(folder / "optimizer-00000.safetensors")) == set(moments(1))


def test_pieces_of_several_ranks_are_put_together(run):
    folder = save(run, 1, cut=by_two)
    assert len(list(folder.glob("model-*"))) == 3 and same(folder, 0)
    part = TensorReader(folder).read("t", "exp_avg", Slice(0, 1, 3), 2, 11)
    assert np.array_equal(part, moments(1)["exp_avg.t"][1:3].reshape(-1)[2:11])


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda pieces: pieces.pop(), "missing"),
        (lambda pieces: pieces.append(pieces[-1]), "there twice"),
        (lambda pieces: pieces[1]["range"].__setitem__(1, 1), "missing"),
        (lambda pieces: pieces[0].update(slice=None), "different dimensions"),
        (lambda pieces: pieces[0]["slice"].__setitem__(2, 1), "missing"),
        (lambda pieces: pieces.clear(), "no pieces"),
    ],
)
def test_an_index_that_does_not_make_up_a_parameter(run, harm, words):
    folder = save(run, 1, cut=by_two)
    index = json.loads((folder / "index.json").read_text())
    harm(index["parameters"]["t"]["pieces"])
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"pieces of parameter t \[4, 6\].*{words}"):
        TensorReader(folder)


def test_another_format_is_refused_by_name(run, monkeypatch):
    monkeypatch.setattr(reader, "FORMAT", 1)
    folder = save(run, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 1; this version of exlm_dist reads format 2"):
        reader.verify(folder)


def test_any_flipped_bit_is_found(run, record_property):
    """Every bit of the smallest files, hundreds of the others: the checkpoint before is taken, and both load right."""
    save(run, 1, seed=7)
    folder = save(run, 2, cut=by_two)
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    assert len(names) == 12
    flips = 0
    for name in names:
        content = (folder / name).read_bytes()
        bits = range(8 * len(content))
        for bit in bits if len(content) < 100 else random.Random(name).sample(bits, 100):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(changed)
            assert reader.step_of(reader.newest_checkpoint(run)) == 1, f"bit {bit} of {name}"
            flips += 1
        for ruin in (lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink):
            ruin(folder / name)
            assert reader.step_of(reader.newest_checkpoint(run)) == 1
        (folder / name).write_bytes(content)
    assert same(folder, 0) and same(checkpoint_folder(run, 1), 7)
    record_property("flipped bits", flips)
    print(f"{flips} flipped bits in {len(names)} files, each found")


def failing(call: str, number: int, how: str) -> list[str]:
    """From now on the `number`-th call of os.`call` fails. The list fills with a line for each call."""
    plain, calls = getattr(os, call), []

    def fail(*arguments, **keywords):
        calls.append(call)
        if len(calls) == number:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*arguments, **keywords)

    setattr(os, call, fail)
    return calls


def save_in_a_child(run: Path, call: str, number: int, how: str) -> tuple[int, str]:
    """(end, message): 0 as many calls are never made, 1 failed with the message, 9 killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            calls = failing(call, number, how)
            save(run, 2, cut=by_two)
            storage.retain(run, keep=1, best=False)
            code = 0 if len(calls) < number else 1  # a failure to remove files of the old one is left for later
        except (rank_files.SaveFailed, OSError) as error:
            os.writev(write, [str(error).encode()])
            code = 1
        except BaseException as error:
            os.writev(write, [repr(error).encode()])
            code = 3
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        message = pipe.read()
    status = os.waitpid(child, 0)[1]
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), message


@pytest.mark.parametrize("how", ["error", "kill"])
def test_a_save_that_fails_anywhere_leaves_the_old_one_or_the_new(run, how, record_property):
    """Every open, write, fsync, mkdir, rename and replace of a save fails in turn, as an error or by SIGKILL: what is
    taken then is the state before it or the new one, right to the last bit, and the next save succeeds."""
    save(run, 1, seed=7)
    os.rename(run / "checkpoints", run / "before")
    points = {call: 0 for call in CALLS}
    taken = {1: 0, 2: 0}
    for call in CALLS:
        end = None
        while end != 0:
            shutil.copytree(run / "before", run / "checkpoints")
            end, message = save_in_a_child(run, call, points[call] + 1, how)
            newest = reader.newest_checkpoint(run)
            assert same(newest, {1: 7, 2: 0}[reader.step_of(newest)])
            if end != 0:
                points[call] += 1
                taken[reader.step_of(newest)] += 1
                assert end == (9 if how == "kill" else 1), message
                assert how == "kill" or "No space left on device" in message or reader.step_of(newest) == 2
            storage.clean(run)
            assert not list((run / "checkpoints").glob(".t*"))
            if points[call] in (1, 5):
                assert same(save(run, 3, seed=5), 5)
            shutil.rmtree(run / "checkpoints")
    assert all(points.values()) and all(taken.values()), (points, taken)
    record_property("crash points", sum(points.values()))
    print(f"{sum(points.values())} crash points {points}: {taken[1]} times the old one, {taken[2]} times the new one")


def test_a_file_that_another_machine_has_written_to_its_own_disk(run):
    temporary = storage.begin(checkpoint_folder(run, 1), 0)
    elsewhere = {"model-00001.safetensors": {"bytes": 8, "sha256": "0"}}
    with pytest.raises(rank_files.SaveFailed, match="model-00001.safetensors is not there. Is the run folder on"):
        storage.publish(temporary, checkpoint_folder(run, 1), 1, elsewhere)
    (temporary / "model-00001.safetensors").write_bytes(b"short")
    with pytest.raises(rank_files.SaveFailed, match="not as long as it was written"):
        storage.publish(temporary, checkpoint_folder(run, 1), 1, elsewhere)
    assert not reader.checkpoint_folders(run)


def test_no_room_is_seen_before(run, monkeypatch):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(rank_files.SaveFailed, match=r"needs 17 MB but only 1 MB are free .*untouched"):
        save(run, 1)
    assert not list((run / "checkpoints").iterdir())


def test_a_damaged_folder_of_the_same_step_is_replaced(run):
    folder = save(run, 3)
    (folder / "COMPLETE").unlink()
    save(run, 3, seed=5)
    assert same(folder, 5)


def test_retention_keeps_the_newest_and_the_best(run):
    for step, nll in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 1.5)):
        save(run, step, nll)
        storage.retain(run, keep=2, best=True)
    assert [reader.step_of(folder) for folder in reader.checkpoint_folders(run)] == [5, 4, 2]
    assert [folder.name for folder in storage.retain(run, keep=1, best=False)] == ["step-00000004", "step-00000002"]
    assert storage.has_whole(run)


def test_the_best_is_the_best_of_those_evaluated_on_the_same_tokens(run):
    """Evaluation on other sequences, or at another masking ratio, from step 3 on."""
    for step, nll, tokens in ((1, 1.0, 50), (2, 0.9, 50), (3, 3.0, 70), (4, 3.5, 70), (5, None, 0)):
        save(run, step, nll, tokens=tokens)
    storage.retain(run, keep=1, best=True)
    assert [reader.step_of(folder) for folder in reader.checkpoint_folders(run)] == [5, 3]


def test_a_checkpoint_that_was_set_aside_goes_when_its_step_is_saved_again(run):
    for step in (2, 4):
        save(run, step)
    storage.set_aside_newer(run, 2)
    assert [reader.step_of(folder) for folder in reader.checkpoint_folders(run)] == [2]
    assert (run / "checkpoints/rejected-step-00000004/COMPLETE").exists()
    save(run, 4, seed=5)
    assert same(checkpoint_folder(run, 4), 5) and not (run / "checkpoints/rejected-step-00000004").exists()


def test_retention_counts_whole_ones_only(run):
    for step in (1, 2, 3):
        save(run, step)
    (checkpoint_folder(run, 3) / "COMPLETE").unlink()
    storage.retain(run, keep=1, best=True)
    assert [reader.step_of(folder) for folder in reader.checkpoint_folders(run)] == [3, 2]
    assert reader.newest_checkpoint(run) == checkpoint_folder(run, 2)


def test_clean_removes_what_killed_saves_left(run):
    save(run, 1)
    for name in (".tmp-step-00000002-77", ".trash-step-00000000-77"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "model-00000.safetensors").write_text("part")
    (run / "checkpoints/.latest.77.tmp").write_text("s")
    storage.clean(run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-00000001"]
