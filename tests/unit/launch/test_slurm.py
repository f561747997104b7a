"""Job files as text, and `exlm launch` without starting anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from locations import ROOT

from exlm_dist.cli import main
from exlm_dist.launch.slurm import FILES, Job, render
from exlm_dist.launch.slurm_scripts import RANKS_PER_NODE
from exlm_dist.utils.errors import ConfigError


@pytest.mark.parametrize("name", FILES)
def test_the_files_of_the_repository_are_what_is_rendered(name):
    path = ROOT / "slurm" / f"{name}.sh"
    assert path.read_text() == render(FILES[name]), f"write {path} again: see docs/operations.md"
    assert path.stat().st_mode & 0o111


@pytest.mark.parametrize("name", FILES)
def test_bash_accepts_them(name):
    assert subprocess.run(["bash", "-n"], input=render(FILES[name]), text=True, timeout=30).returncode == 0


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_a_user_edits_five_lines_and_the_rest_is_the_same_for_all():
    first = render(Job("pretrain")).splitlines()
    other = render(Job("pretrain", account="a", partition="p", nodes=64, gpus_per_node=4, time="1-00")).splitlines()
    changed = [line for line, old in zip(other, first, strict=True) if line != old]
    options = ["--account=a", "--partition=p", "--nodes=64", "--gpus-per-node=4", "--time=1-00"]
    assert changed == [f"#SBATCH {option}" for option in options]


def test_ranks():
    gpus, cpus = Job("pretrain", nodes=3, gpus_per_node=4), Job("pretrain", nodes=3, gpus_per_node=0, tasks_per_node=2)
    assert gpus.ranks == 12 and cpus.ranks == 6
    assert "--ntasks-per-node=2" in directives(render(cpus))
    assert not any("gpus" in line for line in directives(render(cpus)))


def test_what_slurm_or_the_job_would_refuse_is_refused_here():
    with pytest.raises(ConfigError, match="--nodes is 0. Give 1 or more"):
        Job("pretrain", nodes=0)
    with pytest.raises(ConfigError, match="--tasks-per-node is 2 and --gpus-per-node 8"):
        Job("pretrain", tasks_per_node=2)
    with pytest.raises(ConfigError, match="--account 'my account' contains a space"):
        Job("pretrain", account="my account")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    settings = {"name": "tiny", "runs": str(tmp_path / "runs"), "data": {"path": "data"}, "schedule": {"steps": 10}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**settings, "batch": {"sequences": 12, "micro": 3}}))
    return tmp_path / "tiny.yaml"


def test_a_dry_run_prints_the_job_and_the_command_and_writes_nothing(config, capsys, tmp_path):
    command = ["launch", "slurm", str(config), "--seed", "7", "--nodes", "2", "--gpus-per-node", "1", "--dry-run"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.out == render(Job("pretrain", nodes=2, gpus_per_node=1))
    assert f"sbatch {tmp_path}/runs/tiny/slurm/pretrain.sh {config} --seed 7" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_ranks_that_do_not_divide_the_batch_are_refused_before_anything_is_submitted(config, capsys, tmp_path):
    assert main(["launch", "slurm", str(config), "--nodes", "5", "--gpus-per-node", "1"]) == 2
    assert "batch.sequences" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_sweep_checks_every_line_and_reaches_the_job_by_its_environment(config, capsys, tmp_path):
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("--name a --seed 1\n--name b --seed 2\n")
    job = ["launch", "slurm", str(config), "--nodes=2", "--gpus-per-node=1", "--dry-run", f"--sweep={sweep}"]
    assert main([*job, "--array=1-2"]) == 0
    printed = capsys.readouterr()
    assert "--array=1-2" in directives(printed.out) and f"--export=ALL,EXLM_SWEEP={sweep}" in printed.err
    sweep.write_text("--name a --seed 1\n--name b --sead 2\n")
    assert main([*job, "--array=1-2"]) == 2
    assert "sead" in capsys.readouterr().err
    assert main(job) == 2
    assert "--array needs --sweep" in capsys.readouterr().err


def test_local_and_deepspeed_say_what_they_would_start(config, capsys):
    assert main(["launch", "local", str(config), "--launch.processes", "2", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["RANK=0", "RANK=1"]
    assert all(line.endswith(f"pretrain {config} --launch.processes 2") for line in lines)
    assert main(["launch", "deepspeed", str(config), "--dry-run"]) == 0
    assert "deepspeed.launcher.runner" in capsys.readouterr().out


def test_the_flag_that_allows_changes_reaches_every_rank(config, capsys, tmp_path):
    given = [str(config), "--seed", "7", "--allow-changes"]
    said = f"pretrain {config} --allow-changes --seed 7"
    assert main(["launch", "local", *given, "--dry-run"]) == 0 and said in capsys.readouterr().out
    assert main(["launch", "deepspeed", *given, "--dry-run"]) == 0 and said in capsys.readouterr().out
    slurm = ["launch", "slurm", *given, "--nodes=2", "--gpus-per-node=1", "--dry-run"]
    assert main(slurm) == 0 and f"pretrain.sh {config} --allow-changes --seed 7" in capsys.readouterr().err
    assert main(["config", "job", *given]) == 0 and f"{tmp_path}/runs/tiny" in capsys.readouterr().out


def test_a_job_file_asks_for_the_run_folder_and_the_restarts(config, capsys, tmp_path):
    assert main(["config", "job", str(config), "--launch.restarts", "5"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/runs/tiny\n5\n"


def test_it_never_imports_torch():
    code = "import sys, exlm_dist.launch.start; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize(
    "given, failures, per_node, asked",
    [
        ({"SLURM_GPUS_PER_NODE": "4"}, 9, "4", 0),
        ({"SLURM_GPUS_PER_NODE": "h100:4"}, 9, "4", 0),
        ({}, 0, "2", 1),
        ({}, 2, "2", 3),
        ({}, 9, "refused: srun could not ask the nodes for their GPUs", 6),
    ],
)
def test_nodes_that_do_not_answer_are_asked_again_and_nothing_is_guessed(
    given: dict[str, str], failures: int, per_node: str, asked: int, tmp_path: Path
) -> None:
    """`srun` fails so many times; the script itself is told of all 8 GPUs of an exclusive node."""
    (tmp_path / "srun").write_text(
        f"#!/bin/bash\necho >>{tmp_path}/asked\n[ $(wc -l <{tmp_path}/asked) -gt {failures} ] && echo 2\n"
    )
    (tmp_path / "sleep").write_text("#!/bin/bash\n")
    for tool in ("srun", "sleep"):
        (tmp_path / tool).chmod(0o755)
    script = f'set -uo pipefail\nrefuse() {{ echo "refused: $*"; exit 2; }}\n{RANKS_PER_NODE}\necho "$per_node"'
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    done = subprocess.run(["bash", "-c", script], env=environment | given, capture_output=True, text=True, timeout=30)
    assert done.stdout.startswith(per_node), done.stderr
    assert (len((tmp_path / "asked").read_text()) if asked else (tmp_path / "asked").exists()) == asked
