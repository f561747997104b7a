"""The `exlm` command as a user meets it: the whole way from a small file to results, and its errors."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_run import MOLECULES

from exlm_dist.cli import build_parser, main

TINY = """
name: tiny
runs: {runs}
data: {{path: {data}}}
model: {{jump_prior: none, layers: 1, width: 16, heads: 2, ffn: 32, states: 2, max_positions: 128}}
batch: {{sequences: 8, micro: 2}}
schedule: {{steps: 6, warmup: 2}}
checkpoint: {{every: 3}}
evaluation: {{every: 3, sequences: 8}}
tracking: {{every: 2, system: false}}
launch: {{processes: 2, timeout: 30, device: cpu, threads: 1}}
"""


def exlm(*arguments: str | Path, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process."""
    return subprocess.run(
        [sys.executable, "-m", "exlm_dist.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Shards of a gzipped csv with one invalid row, made by the command."""
    folder = tmp_path_factory.mktemp("prepared")
    carbons = ["C" * length + "O" for length in range(1, 31)]
    rows = [
        "name,smiles",
        "broken,C1CC",
        *(f"m{number},{smiles}" for number, smiles in enumerate([*MOLECULES, *carbons])),
    ]
    (folder / "molecules.csv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    result = exlm(
        "prepare",
        "smiles",
        "--input",
        folder / "molecules.csv.gz",
        "--column",
        "smiles",
        "--out",
        folder / "data",
        "--valid-fraction",
        "0.2",
        "--workers",
        "1",
    )
    assert result.returncode == 0, result.stderr
    assert "set aside    1 (1 not SMILES)" in result.stdout
    return folder / "data"


@pytest.fixture(scope="module")
def configuration(prepared, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(runs=folder / "runs", data=prepared))
    return path


@pytest.fixture(scope="module")
def run(configuration) -> Path:
    """The run of the configuration, trained by two local processes."""
    result = exlm("pretrain", configuration)
    assert result.returncode == 0, result.stderr
    return configuration.parent / "runs" / "tiny"


def test_deepspeed_launcher_trains_and_the_same_command_says_finished(configuration, run):
    result = exlm("launch", "deepspeed", configuration, "--name", "launched", "--parallel.zero", "2")
    assert result.returncode == 0, result.stderr
    launched = run.with_name("launched")
    assert (launched / "checkpoints" / "step-00000006" / "COMPLETE").exists()
    again = exlm("pretrain", configuration, "--name", "launched", "--parallel.zero", "2", "--launch.processes", "1")
    assert again.returncode == 0 and "finished at step 6" in again.stderr


def test_evaluate_report_sync_and_export(run, tmp_path, capsys):
    assert main(["evaluate", str(run)]) == 0
    assert "nats per masked token" in capsys.readouterr().out
    assert main(["report", str(run)]) == 0
    assert (run / "report.md").is_file() and list((run / "plots").glob("*.png"))
    assert main(["sync", str(run)]) == 0
    assert main(["export", "fairseq", str(run), "--out", str(tmp_path / "model.safetensors")]) == 0
    assert (tmp_path / "model.safetensors").stat().st_size > 1000
    assert main(["export", "hf", str(run), "--out", str(tmp_path / "new" / "folder")]) == 0
    assert (tmp_path / "new" / "folder" / "config.json").is_file()


def test_run_folder_holds_the_resolved_configuration_and_the_events(run):
    assert main(["config", "show", str(run / "config.yaml")]) == 0
    kinds = {json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()}
    assert {"metrics", "status", "child_run"} <= kinds


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--optimizer.lrr", "1"], 2, "Did you mean optimizer.lr?"),
        (["--schedule.steps", "7"], 78, "schedule.steps  6           7          accepts it"),
        (["--model.max_positions", "8", "--name", "short"], 2, "model.max_positions 8"),
        (
            ["--batch.sequences", "6", "--name", "odd"],
            2,
            "6 is not a multiple of 2 data-parallel ranks x batch.micro 2 = 4",
        ),
        (["--data.path", "nowhere", "--name", "empty"], 77, "exlm prepare"),
    ],
    ids=["unknown key", "other settings", "too long", "does not divide", "no shards"],
)
def test_a_wrong_run_ends_every_rank_at_once(configuration, run, arguments, code, words):
    started = time.monotonic()
    result = exlm("pretrain", configuration, *arguments)
    assert result.returncode == code, result.stderr
    assert words in result.stderr
    assert time.monotonic() - started < 60


def test_a_port_in_use_is_named(configuration, run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = exlm("pretrain", configuration, "--name", "port", "--launch.timeout", "5", MASTER_PORT=str(port))
    assert result.returncode != 0
    assert f"port {port}" in result.stderr and "in use" in result.stderr


@pytest.mark.parametrize(
    "content, arguments, words",
    [
        ("name,smiles\na,CCO\n", ["--column", "smile"], "did you mean 'smiles'"),
        ("", [], "empty"),
        ("smiles\nxx\nyy\nhello world\n", ["--column", "smiles"], "exlm prepare text"),
    ],
    ids=["wrong column", "empty file", "text given as molecules"],
)
def test_input_that_cannot_be_prepared(tmp_path, capsys, content, arguments, words):
    (tmp_path / "input.csv").write_text(content)
    code = main(
        [
            "prepare",
            "smiles",
            "--input",
            str(tmp_path / "input.csv"),
            "--out",
            str(tmp_path / "out"),
            "--workers",
            "1",
            *arguments,
        ]
    )
    assert code == 77 and words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_hostfile_that_is_not_there(configuration, capsys):
    assert main(["launch", "deepspeed", str(configuration), "--hostfile", "nowhere"]) == 2
    assert "no host file at nowhere" in capsys.readouterr().err


def test_unknown_argument_of_a_command_without_overrides(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["report", "run", "--colour"])
    assert ended.value.code == 2 and "--colour" in capsys.readouterr().err


def commands_of(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Words of every command and group of commands, `("prepare", "smiles")`."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield (*words, name)
                yield from commands_of(child, (*words, name))


@pytest.mark.parametrize("words", [(), *commands_of(build_parser())], ids=" ".join)
def test_help(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith(f"usage: {' '.join(('exlm', *words))} ")


def test_help_loads_nothing_heavy():
    heavy = {"torch", "deepspeed", "mlflow", "numpy", "pydantic", "yaml", "rdkit", "psutil"}
    code = (
        "import sys\nfrom exlm_dist.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        f"sys.exit(str(found) if (found := {heavy} & sys.modules.keys()) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
