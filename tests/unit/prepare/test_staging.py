"""Publishing: as a whole or not at all, whatever interrupts it."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exlm_dist.data.manifest import MANIFEST
from exlm_dist.prepare import shard_writer
from exlm_dist.prepare.folder import PREPARED
from exlm_dist.prepare.smiles import prepare_smiles
from exlm_dist.utils.errors import DataError, OutputError
from exlm_dist.utils.progress import Progress
from exlm_dist.utils.staging import remove_leftovers, staged_folder
from exlm_dist.utils.workers import ordered_map

HOLDER = """
import sys, time
from pathlib import Path
from exlm_dist.prepare.folder import PREPARED
from exlm_dist.utils.staging import staged_folder
with staged_folder(Path(sys.argv[1]), PREPARED, overwrite=False) as folder:
    (folder / "part").write_text("x")
    print(folder, flush=True)
    time.sleep(100)
"""


def hold(out: Path) -> tuple[subprocess.Popen, Path]:
    """A process in the middle of writing `out`, and its hidden folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    return process, Path(process.stdout.readline().strip())


def test_published_when_the_block_ends_and_only_then(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged_folder(out, PREPARED, overwrite=False) as folder:
        (folder / MANIFEST).write_text("{}")
        assert not out.exists() and folder.parent == out.parent
    assert (out / MANIFEST).is_file() and not folder.exists()
    with pytest.raises(KeyError), staged_folder(tmp_path / "b", PREPARED, overwrite=False) as folder:
        raise KeyError
    assert list(tmp_path.iterdir()) == [tmp_path / "deep"]


def test_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.smi"
    source.write_text("CCO\nCCC\nCCCC\n")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_writer._OpenShard, "_put", full)
    with pytest.raises(OutputError, match=r"out: no space left while writing \(No space .* MB free now\)"):
        prepare_smiles([str(source)], tmp_path / "out", workers=1)
    assert list(tmp_path.iterdir()) == [source]


def test_killed_run_leaves_nothing_that_looks_finished_and_the_next_cleans_up(tmp_path: Path) -> None:
    process, folder = hold(tmp_path / "out")
    try:
        assert folder.is_dir() and not (tmp_path / "out").exists()
        remove_leftovers(tmp_path / "out")
        assert (folder / "part").is_file(), "the folder of a running process must stay"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    other = tmp_path / ".other.abc.partial"
    other.mkdir()
    with staged_folder(tmp_path / "out", PREPARED, overwrite=False) as fresh:
        (fresh / MANIFEST).write_text("{}")
    assert not folder.exists() and other.is_dir() and (tmp_path / "out" / MANIFEST).is_file()


def test_what_may_not_be_replaced(tmp_path: Path) -> None:
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with (
            pytest.raises(OutputError, match="exists and is not a folder of prepared data"),
            staged_folder(out, PREPARED, overwrite=overwrite),
        ):
            pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"file"), staged_folder(tmp_path / "file" / "out", PREPARED, overwrite=False):
        pass
    assert (out / "thesis.tex").is_file()


def test_two_at_once_the_second_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with staged_folder(out, PREPARED, overwrite=False) as first:
        with (
            pytest.raises(OutputError, match="another process is writing it .*partial"),
            staged_folder(out, PREPARED, overwrite=True),
        ):
            raise AssertionError("the work begins")
        (first / MANIFEST).write_text("first")
    assert (out / MANIFEST).read_text() == "first" and list(tmp_path.iterdir()) == [out]
    (out / MANIFEST).unlink()

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)  # then the one that ends later is refused
    with (
        pytest.raises(OutputError, match="is a folder of prepared data already"),
        staged_folder(out, PREPARED, overwrite=False) as late,
    ):
        (late / MANIFEST).write_text("late")
        with staged_folder(out, PREPARED, overwrite=False) as early:
            (early / MANIFEST).write_text("early")
    assert (out / MANIFEST).read_text() == "early" and list(tmp_path.iterdir()) == [out]


def test_no_more_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.context.SpawnProcess._Popen", refused)
    with pytest.raises(DataError, match="no more worker processes can be started here .*--workers 1"):
        list(ordered_map(square_or_die, range(4), 2))


def square_or_die(number: int) -> int:
    if number == 7:
        os._exit(9)
    return number * number


def slow_square(number: int) -> int:
    time.sleep(0.02 * (number % 3))
    return number * number


def test_results_keep_their_order() -> None:
    for workers in (1, 2):
        assert list(ordered_map(slow_square, range(20), workers)) == [number * number for number in range(20)]
    assert list(ordered_map(slow_square, [], 2)) == []


def test_a_worker_that_dies_is_an_error_not_a_hang() -> None:
    with pytest.raises(DataError, match="a worker process died"):
        list(ordered_map(square_or_die, range(20), 2))


WORKERS = """
import os, sys, time
from exlm_dist.utils.workers import ordered_map

def begun(number):
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(100)

if __name__ == "__main__":
    list(ordered_map(begun, range(9), 2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a kernel that kills orphans")
def test_workers_do_not_outlive_a_process_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(WORKERS)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    assert len({*workers, parent.pid}) == 3
    parent.kill()
    parent.wait()
    parent.stdout.read()  # ends when nobody can write any more


def test_progress_is_plain_lines_without_a_terminal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exlm_dist.utils.progress.SECONDS", 0.0)
    with caplog.at_level("INFO", logger="exlm_dist"), Progress("shards", "rows", 2000) as progress:
        progress.update(1000)
        progress.update(1000)
    texts = [record.getMessage() for record in caplog.records]
    assert texts[0].startswith("shards: 1,000 of 2,000 rows so far, ") and texts[-1].startswith(
        "shards: 2,000 of 2,000 rows done, "
    )
