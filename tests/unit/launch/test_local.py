"""The supervisor of local ranks; the ranks are a few lines of Python."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exlm_dist.launch.local import RANK_COMMAND, rank_environments, supervise
from exlm_dist.utils.errors import ERROR_FILE, EXIT_DATA, EXIT_RETRY, EXIT_SAVED, EXIT_USAGE

ROOT = Path(__file__).resolve().parents[3]


def launch(code: str, folder: Path, ranks: int = 3, grace: float = 1.0) -> int:
    return supervise(
        [sys.executable, "-c", "import os, sys, time; rank = int(os.environ['RANK'])\n" + code],
        rank_environments(ranks, folder),
        grace=grace,
    )


def test_all_ranks_succeed(tmp_path):
    code = f"""
names = ('WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(' '.join(os.environ[name] for name in names))"""
    assert launch(code, tmp_path) == 0
    found = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [row[:3] for row in found] == [["3", str(rank), "127.0.0.1"] for rank in range(3)] and len(
        {row[3] for row in found}
    ) == 1


def test_the_cause_is_reported_not_its_consequences(tmp_path, capfd):
    """Rank 1 fails; rank 0 only loses its peer, and exits first; rank 2 does not notice."""
    code = f"""
if rank == 1:
    time.sleep(0.3); open(os.environ['{ERROR_FILE}'], 'w').write('shard 7 is gone'); sys.exit({EXIT_DATA})
if rank == 0: sys.exit({EXIT_RETRY})
time.sleep(60)"""
    start = time.monotonic()
    assert launch(code, tmp_path) == EXIT_DATA
    assert time.monotonic() - start < 30
    assert "rank 1 of 3 ended the run (exit code 77): shard 7 is gone" in capfd.readouterr().err


def test_a_killed_rank(tmp_path, capfd):
    assert launch("os.kill(os.getpid(), 9) if rank == 2 else time.sleep(60)", tmp_path) == EXIT_RETRY
    assert "rank 2 was killed by SIGKILL" in capfd.readouterr().err


def test_a_rank_that_cannot_import_says_what_where_and_how_to_fix_it(tmp_path, capfd, monkeypatch):
    (tmp_path / "torch.py").write_text("import libmissing")
    (tmp_path / "run.yaml").write_text("name: run\ndata: {path: nowhere}\nschedule: {steps: 10, warmup: 1}\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    code = supervise([*RANK_COMMAND, str(tmp_path / "run.yaml")], rank_environments(2, tmp_path), grace=5.0)
    said = f"(exit code {EXIT_USAGE}): {sys.executable} on {platform.node()} cannot import what exlm needs"
    text = capfd.readouterr().err
    assert code == EXIT_USAGE and said in text and "No module named 'libmissing'" in text and "EXLM_PYTHON" in text
    assert (tmp_path / "rank-0.code").read_text() == f"{EXIT_USAGE}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_signals_reach_every_rank(number, tmp_path):
    code = f"""
import sys; sys.path.insert(0, r'{ROOT}')
from exlm_dist.launch.local import RANK_COMMAND, rank_environments, supervise
from pathlib import Path
rank = ("import signal, sys, time, os; signal.signal({int(number)}, lambda *_: sys.exit({EXIT_SAVED}));"
        "open(os.environ['RANK'], 'w').close(); time.sleep(60)")
sys.exit(supervise([sys.executable, '-c', rank], rank_environments(2, Path('.'))))"""
    supervisor = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    try:
        wait_for(lambda: all((tmp_path / name).exists() for name in "01"))
        supervisor.send_signal(number)
        assert supervisor.wait(20) == EXIT_SAVED
    finally:
        supervisor.kill()  # its ranks die with it


def test_a_killed_supervisor_leaves_no_orphans(tmp_path):
    code = f"""
import sys; sys.path.insert(0, r'{ROOT}')
from exlm_dist.launch.local import RANK_COMMAND, rank_environments, supervise
from pathlib import Path
rank = "import os, time; open('pid', 'w').write(str(os.getpid())); os.rename('pid', 'ready'); time.sleep(60)"
sys.exit(supervise([sys.executable, '-c', rank], rank_environments(1, Path('.'))))"""
    supervisor = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    wait_for(lambda: (tmp_path / "ready").exists())
    supervisor.kill()
    supervisor.wait(10)
    pid = int((tmp_path / "ready").read_text())
    wait_for(lambda: not alive(pid))


def test_it_never_imports_torch():
    code = "import sys, exlm_dist.launch.local; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0]


def wait_for(condition, limit: float = 20.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)
