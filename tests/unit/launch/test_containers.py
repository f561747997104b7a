"""Job files in a container: it sees the project, the data and the runs, and nothing that was not mounted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pretended_containers
import pytest
import yaml
from locations import ROOT

from exlm_dist.cli import main
from exlm_dist.launch.slurm import FILES, Job, render
from exlm_dist.utils.errors import ConfigError

#: The image's Python: a configuration names a file of data and the runs; the first start of the ranks fails.
PYTHON = r"""#!/bin/bash
shift 2
case $1 in
    config) source "$3" && [ -e "$data" ] || { echo "no data at $data" >&2; exit 2; }
        printf '%s\n5\n' "$runs/r" ;;
    pretrain) source "$2" && mkdir -p "$runs/r" && echo "$PWD $PYTHONNOUSERSITE" >>"$runs/r/starts"
        [ "$(wc -l <"$runs/r/starts")" = 2 ] || { echo lost >"$EXLM_ERROR_FILE"; exit 76; } ;;
    *) echo "$PWD $*" ;;
esac
"""
SRUN_WITHOUT_PYXIS = '#!/bin/bash\nwhile [[ $1 = --* ]]; do shift; done\nSLURM_PROCID=0 SLURM_LOCALID=0 exec "$@"\n'
needs_namespaces = pytest.mark.skipif(pretended_containers.flags() is None, reason="unshare --mount is not permitted")


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A cluster's file system: the project, from which jobs are submitted, and data and runs outside of it."""
    for folder in ("project", "data", "runs"):
        (tmp_path / "world" / folder).mkdir(parents=True)
    world = tmp_path / "world"
    (world / "data/file").touch()
    (world / "project/exlm.sif").touch()
    (world / "project/run.yaml").write_text(f"data={world}/data/file runs={world}/runs\n")
    return world


def run_job(job: Job, world: Path, *arguments: str, pyxis: bool) -> subprocess.CompletedProcess:
    """The job file, run by bash with stand-ins for Slurm."""
    tools = pretended_containers.install(world.parent, world, PYTHON, pyxis=pyxis)
    scripts = {"scontrol": '#!/bin/bash\n[ "$1 $2" = "show hostnames" ] && echo n1 || echo " NodeAddr=127.0.0.1"\n'}
    if not pyxis:
        scripts["srun"] = SRUN_WITHOUT_PYXIS
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (world.parent / "job.sh").write_text(render(job))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "EXLM_"))}
    environment |= {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(world / "project"), "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "n1"}
    return subprocess.run(
        ["bash", str(world.parent / "job.sh"), *arguments],
        env=environment | {"SLURM_GPUS_PER_NODE": "1", "SLURM_STEP_ID": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@needs_namespaces
@pytest.mark.parametrize("image", ["registry.org#exlm:1", "exlm.sif"], ids=["pyxis", "apptainer"])
def test_ranks_in_a_container_see_project_data_and_runs(world, image):
    pyxis = not image.endswith(".sif")
    mounts = (str(world / "data"), str(world / "runs"))
    done = run_job(Job("pretrain", container=image, mounts=mounts), world, "run.yaml", pyxis=pyxis)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (world / "runs/r/starts").read_text() == f"{world}/project 1\n" * 2
    # The same container at every start, so that an image is unpacked once.
    wanted = f"{image} exlm-7" if pyxis else str(world / "project/exlm.sif")
    assert (world.parent / "bin/images").read_text().splitlines() == [wanted] * 3


@needs_namespaces
@pytest.mark.parametrize("pyxis", [True, False], ids=["pyxis", "apptainer"])
def test_what_is_not_mounted_is_not_there(world, pyxis):
    image = "exlm" if pyxis else "exlm.sif"
    done = run_job(Job("pretrain", container=image), world, "run.yaml", pyxis=pyxis)
    assert done.returncode == 2 and f"no data at {world}/data/file" in done.stderr


@needs_namespaces
@pytest.mark.parametrize("kind", ["evaluate", "prepare"])
def test_the_other_job_files_run_in_it_too(world, kind):
    done = run_job(Job(kind, container="exlm.sif"), world, "there", pyxis=False)
    assert done.returncode == 0 and f"{world}/project {kind} there" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "job, words",
    [
        (Job("pretrain", container="gone.sif"), "no image at gone.sif"),
        (Job("pretrain", container="exlm.sif", mounts=("/gone",)), "the container is to see /gone"),
        (Job("pretrain", container="exlm"), "srun has no --container-image here (pyxis is not installed)"),
    ],
    ids=["image", "folder", "pyxis"],
)
@needs_namespaces
def test_what_is_missing_is_said_before_anything_starts(world, job, words):
    done = run_job(job, world, "run.yaml", pyxis=False)
    assert done.returncode == 2 and f"error: {words}" in " ".join(done.stdout.split("  ")), done.stdout + done.stderr


@pytest.fixture
def config(world, monkeypatch) -> Path:
    """Submitted from the project, as a user would."""
    monkeypatch.chdir(world / "project")
    settings = {
        "name": "tiny",
        "runs": "../runs/deep",
        "data": {"path": str(world / "data")},
        "schedule": {"steps": 10},
    }
    path = Path("tiny.yaml")
    path.write_text(yaml.safe_dump({**settings, "batch": {"sequences": 12, "micro": 3}}))
    return path


def lines_of(text: str, *names: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(names)]


def test_launch_mounts_what_the_settings_name(config, world, capsys):
    command = ["launch", "slurm", str(config), "--nodes=2", "--gpus-per-node=1", "--dry-run", "--container=exlm.sif"]
    assert main([*command, "--mount", str(world / "runs"), "--mount=sub", "--mount=/scratch"]) == 0
    image, mounts = lines_of(capsys.readouterr().out, "image=", "mounts=")
    assert image == f"image={world}/project/exlm.sif"
    # The folder of the runs is inside one that is mounted, and `sub` inside that of the project.
    assert mounts == f"mounts=(/scratch {world}/data {world}/runs)"


def test_wrong_options_are_refused_before_anything_is_submitted(config, capsys):
    command = ["launch", "slurm", str(config), "--nodes=2", "--gpus-per-node=1", "--dry-run"]
    assert main([*command, "--container=none.sqsh"]) == 2 and "no image at" in capsys.readouterr().err
    assert main([*command, "--mount=/data"]) == 2 and "--mount needs --container" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="has a space, a comma or a colon"):
        Job("pretrain", container="x", mounts=("/a,b",))


@pytest.mark.parametrize("name", FILES)
def test_bash_accepts_job_files_with_a_container(name):
    text = render(Job(name, container="nvcr.io#nvidia/pytorch:25.01-py3", mounts=("/data", "/a'b")))
    assert subprocess.run(["bash", "-n"], input=text, text=True, timeout=30).returncode == 0


def copied(recipe: str) -> set[str]:
    """What a recipe takes from the project."""
    text = (ROOT / "containers" / recipe).read_text()
    if recipe == "Dockerfile":
        return {name for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for name in line.split()}
    section = text.partition("%files\n")[2].partition("\n\n")[0]
    assert all(target == f"/opt/exlm/{source}" for source, target in map(str.split, section.splitlines()))
    return {line.split()[0] for line in section.splitlines()}


def test_the_recipes_take_what_an_installation_needs(tmp_path):
    """Both the same files, from which a package is built and runs."""
    assert copied("Dockerfile") == copied("exlm.def")
    (tmp_path / "exlm").mkdir()
    for name in copied("Dockerfile"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / "exlm" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / "exlm")
    assert os.access(tmp_path / "exlm/launchers/install.sh", os.X_OK)
    code = (
        "import os, setuptools.build_meta as build\n"
        f"os.chdir({str(tmp_path / 'exlm')!r})\nbuild.build_wheel({str(tmp_path)!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as built:
        inside = set(built.namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "exlm_dist").rglob("*.py")}
    assert sources <= inside


@pytest.mark.parametrize("recipe", ["Dockerfile", "exlm.def"])
def test_the_commands_of_the_recipes_are_those_of_a_shell(recipe):
    text = (ROOT / "containers" / recipe).read_text()
    if recipe == "Dockerfile":
        commands = re.findall(r"^RUN ((?:.*\\\n)*.*)$", text, re.M)
    else:
        commands = [text.partition("%post\n")[2].partition("\n\n")[0].replace("{{ TORCH_INDEX }}", "index")]
    assert any("launchers/install.sh" in command and "EXLM_TORCH_INDEX" in command for command in commands)
    for command in commands:
        assert subprocess.run(["sh", "-n"], input=command, text=True, timeout=30).returncode == 0
