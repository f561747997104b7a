"""Outputs at links, mount points, read-only places and in folders that are not there: written, or refused at once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exlm_dist.checkpoint.weights_only import AVERAGE, check_target
from exlm_dist.data.manifest import MANIFEST
from exlm_dist.data.shards import ShardDataset
from exlm_dist.finetuning.model_folder import check_free
from exlm_dist.prepare import folder as prepare_folders
from exlm_dist.prepare.folder import PREPARED
from exlm_dist.prepare.smiles import prepare_smiles
from exlm_dist.utils.errors import ConfigError, OutputError
from exlm_dist.utils.outputs import check_writable, user_path
from exlm_dist.utils.staging import check_output, staged_folder

#: Run where file systems can be mounted: argv is a folder with `a.smi` and the empty folders `disk` and `locked`.
ON_MOUNTS = """
import os, subprocess, sys
from pathlib import Path
from exlm_dist.data.shards import ShardDataset
from exlm_dist.prepare.smiles import prepare_smiles
from exlm_dist.utils.errors import OutputError

os.chdir(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "none", "disk"], check=True)
os.mkdir("disk/lost+found")
call = {"inputs": ["a.smi"], "out": "disk", "workers": 1}
first = prepare_smiles(**call)
assert sorted(os.listdir("disk")) == ["lost+found", "manifest.json", "quarantine.tsv", "tokenizer", "train", "valid"]
assert prepare_smiles(**call).reused
second = prepare_smiles(**call, max_length=20, overwrite=True, max_rejected=1)
assert len(ShardDataset.open("disk", "train")) == second.sequences["train"] < first.sequences["train"]
assert len(os.listdir("disk")) == 6
Path("disk/thesis.tex").write_text("x")
os.unlink("disk/manifest.json")
try:
    prepare_smiles(**call, overwrite=True)
except OutputError as error:
    assert "is not a folder of prepared data" in str(error)
subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", "locked"], check=True)
for out in ("locked", "locked/new/deep"):
    try:
        prepare_smiles(["missing.smi"], out)
    except OutputError as error:
        assert "Read-only file system" in str(error), error
    else:
        raise AssertionError(out)
"""


def test_a_mount_point_is_filled_and_a_read_only_one_is_refused_at_once(tmp_path: Path) -> None:
    unshare = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "mount", "-t", "tmpfs", "none", "/mnt"]).returncode:
        pytest.skip("file systems cannot be mounted here")
    (tmp_path / "disk").mkdir()
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.smi").write_text("\n".join("C" * length for length in range(1, 40)))
    script = [*unshare, sys.executable, "-c", ON_MOUNTS, str(tmp_path)]
    result = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_a_folder_that_cannot_be_replaced_is_filled_with_its_marker_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "out")
    out = tmp_path / "out"
    out.mkdir()
    for version in ("old", "new"):
        with staged_folder(out, PREPARED, overwrite=version == "new") as folder:
            assert folder.parent == out
            (folder / MANIFEST).write_text(version)
            (folder / version).mkdir()
    assert (out / MANIFEST).read_text() == "new" and sorted(path.name for path in out.iterdir()) == [MANIFEST, "new"]
    moved: list[str] = []
    rename = prepare_folders.os.rename
    monkeypatch.setattr("os.rename", lambda old, new: (moved.append(Path(old).name), rename(old, new)))
    with staged_folder(out, PREPARED, overwrite=True) as folder:
        (folder / MANIFEST).write_text("x")
        (folder / "a").mkdir()
        (folder / "z").mkdir()
    assert moved == [MANIFEST, "new", "a", "z", MANIFEST] or moved == [MANIFEST, "new", "z", "a", MANIFEST]
    with pytest.raises(ConfigError, match=f"Name one in it: {out}/average"):
        check_target(out, AVERAGE)


def test_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "a.smi").write_text("\n".join("C" * length for length in range(1, 40)))
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "nowhere").symlink_to(tmp_path / "later")
    for out in ("link", "nowhere"):
        prepare_smiles([str(tmp_path / "a.smi")], tmp_path / out, workers=1)
        assert (tmp_path / out).is_symlink() and len(ShardDataset.open(tmp_path / out, "train"))


@pytest.mark.parametrize(
    "check",
    [
        check_writable,
        lambda out: check_output(out, PREPARED, False),
        lambda out: check_target(out, AVERAGE),
        check_free,
        lambda out: prepare_smiles(["missing.smi"], out),
    ],
)
def test_every_output_is_tried_before_the_work(check, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="nothing can be written in /proc"):
        check(Path("/proc/new/out"))
    with pytest.raises(OutputError, match="file is a file"):
        check(tmp_path / "file" / "out")


def test_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert user_path("~/x") == Path("/home/ada/x") and user_path(Path("~")) == Path("/home/ada")
    assert user_path("x/~") == Path("x/~") and user_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
