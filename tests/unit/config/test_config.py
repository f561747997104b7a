"""Settings: round trip, errors with file, line and remedy, cross-checks, shipped files, generated reference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from exlm_dist.cli import main
from exlm_dist.config import (
    RunConfig,
    check_length,
    check_world,
    config_difference,
    dump_config,
    flatten,
    load,
    load_config,
    load_stored,
    reference,
    schema,
)
from exlm_dist.config.load import known_keys
from exlm_dist.config.schema import ModelConfig
from exlm_dist.utils.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted((ROOT / "configs").glob("*/*.yaml"))
MINIMAL = "name: run\ndata: {path: data/x}\nschedule: {steps: 10}\n"


@pytest.fixture
def write(tmp_path):
    def _write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return _write


def failure(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return str(caught.value)


def test_the_former_name_of_the_torch_backend_still_loads(write):
    config = load_config(write(MINIMAL + "kernels: {backend: reference}\n"))
    assert config == load_config(write(MINIMAL), ["--kernels.backend", "torch"]) and "torch" in dump_config(config)


def test_a_stored_run_without_a_younger_setting_has_what_it_was_trained_with(write, monkeypatch):
    class Model(ModelConfig):
        jump_prior: Literal["none", "group"] = "group"

    class Run(RunConfig):
        model: Model = Model()

    monkeypatch.setattr(load, "RunConfig", Run)  # as if the default were another
    for section in ("", "model: {layers: 2}\n"):
        path = write(MINIMAL + section)
        assert load_config(path).model.jump_prior == "group" and load_stored(path).model.jump_prior == "none"
    path.write_text(MINIMAL + "model: {jump_prior: group}\n")
    assert load_stored(path).model.jump_prior == "group"


def test_a_prior_is_stored_with_its_numbers(write, monkeypatch):
    config = load_config(write(MINIMAL + "model: {jump_prior: group, jump_width: 0}\n"), ["--model.jump_floor", "6"])
    assert (config.model.jump_width, config.model.jump_floor) == (0.125, 6.0)
    monkeypatch.setitem(schema.JUMP_SHAPES, "group", (9.0, 9.0))
    assert load_stored(write(dump_config(config), "stored.yaml")) == config
    assert ModelConfig(jump_prior="none").jump_width == 0


@pytest.mark.parametrize(
    "changes, kind",
    [
        ({}, "group"),
        ({"transitions": "sparse"}, "none"),
        ({"transitions": "uniform"}, "none"),
        ({"objective": "mlm"}, "none"),
    ],
)
def test_the_prior_of_new_models(changes, kind):
    chosen = ModelConfig(**changes)
    assert (chosen.jump_prior, chosen.jump_width) == (kind, {"group": 0.125, "none": 0.0}[kind])
    assert ModelConfig(jump_prior="auto", **changes) == chosen


def test_dump_and_load_give_an_equal_object(write):
    config = load_config(
        write(MINIMAL), ["--model.layers", "3", "--tracking.uri=http://127.0.0.1:5000", "--budget", "a: b"]
    )
    assert config.model.layers == 3 and config.tracking.uri == "http://127.0.0.1:5000" and config.budget == "a: b"
    assert load_config(write(dump_config(config), "again.yaml")) == config


@pytest.mark.parametrize("name", ["20251127", "007", "2025-11-27", "1.10", "12_000", "yes", "2025-13-45", "1e5"])
def test_a_name_that_looks_like_something_else_is_text(name, write):
    config = load_config(write(MINIMAL.replace("name: run", f"name: {name}") + f"budget: {name}\n"))
    assert config.name == name and config.budget == name
    assert load_config(write(dump_config(config), "again.yaml")) == config
    assert load_config(write(MINIMAL), ["--name", name, "--budget", f'"{name}"']) == config


@pytest.mark.parametrize("name", ["my run", "../x", "a/b", ".", "", "-x", "x" * 101, "ü", "a\n"])
def test_a_name_that_is_no_name_of_a_folder(write, name):
    assert "up to 100 letters, digits" in failure(write(MINIMAL), "--name", f"{name!r}")


def test_text_that_is_missing_or_empty(write):
    assert "should be a valid string" in failure(write(MINIMAL.replace("name: run", "name:")))
    assert load_config(write(MINIMAL + "budget: x\n"), ["--budget", ""]).budget == ""


def test_a_date_that_does_not_exist(write):
    path = write(MINIMAL + "seed: 2025-13-45\n")
    assert failure(path).startswith(f"{path}:4: seed: month must be")
    assert "seed" in failure(write(MINIMAL), "--seed", "2025-13-45")


def test_number_in_scientific_notation_without_a_dot_is_a_number(write):
    assert load_config(write(MINIMAL + "optimizer: {lr: 2e-3}\n")).optimizer.lr == 2e-3


def test_unknown_key_names_file_line_and_suggestion(write):
    path = write(MINIMAL + "optimizer:\n  lr: 1.0\n  weigth_decay: 0.1\n")
    assert failure(path).startswith(
        f"{path}:6: optimizer.weigth_decay: unknown setting. Did you mean optimizer.weight_decay?"
    )


def test_unknown_key_on_the_command_line(write):
    message = failure(write(MINIMAL), "--optim.lr", "1")
    assert "command line: optim: unknown setting" in message and "optimizer" in message


def test_all_errors_are_reported_at_once(write):
    message = failure(write("name: run\nmodel: {layers: none, width: -4}\nschedule: {steps: 10}\n"))
    assert len(message.splitlines()) == 3
    assert (
        "data: must be given" in message
        and "model.layers = 'none'" in message
        and "greater than or equal to 4" in message
    )


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "empty"),
        ("a: [", "not valid YAML"),
        ("- 1", "key: value"),
        ("name: a\nname: b\n", "given twice"),
        ("base: run.yaml\n", "leads back"),
        (MINIMAL + "model: 3\n", "model = 3"),
    ],
)
def test_files_that_are_not_configurations(write, text, words):
    assert words in failure(write(text))


def test_missing_file_suggests_a_similar_one(write):
    path = write(MINIMAL, "demo.yaml")
    assert "Did you mean" in failure(path.with_name("dmo.yaml"))


def test_a_file_overrides_its_base(write):
    write(MINIMAL + "model: {layers: 5, width: 64, heads: 4}\n", "base.yaml")
    config = load_config(write("base: base.yaml\nname: other\nmodel: {layers: 2}\n"))
    assert (config.name, config.model.layers, config.model.width) == ("other", 2, 64)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["--model.heads", "7"], ["768", "model.heads 7", "Nearest that fits: model.heads 6"]),
        (["--model.width", "72", "--model.heads", "12"], ["head width 6", "divisible by 4", "model.width 96"]),
        (["--model.objective", "mlm"], ["model.states 1", "model.anchors false"]),
        (["--model.jump_prior", "group", "--model.transitions", "uniform"], ["group", "uniform", "jump_prior none"]),
        (
            ["--model.jump_prior", "group", "--model.objective", "mlm", "--model.states", "1"],
            ["model.objective mlm has none", "model.jump_prior none"],
        ),
        (["--masking.keep", "0.6", "--masking.random", "0.5"], ["more than 1"]),
        (["--schedule.warmup", "10"], ["schedule.warmup 10", "schedule.steps 10"]),
        (["--batch.sequences", "100", "--batch.micro", "32"], ["100", "32", "Nearest: batch.sequences 96"]),
    ],
)
def test_settings_that_contradict_each_other(write, overrides, words):
    message = failure(write(MINIMAL), *overrides)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "arguments, words",
    [(["model.layers", "2"], "--section.key"), (["--seed"], "no value"), (["--seed", "--name"], "no value")],
)
def test_malformed_overrides(write, arguments, words):
    assert words in failure(write(MINIMAL), *arguments)


def test_world_that_does_not_divide_the_batch(write):
    config = load_config(write(MINIMAL), ["--batch.sequences", "96", "--batch.micro", "32"])
    check_world(config, 3)
    with pytest.raises(
        ConfigError,
        match=r"96 is not a multiple of 2 data-parallel ranks x batch.micro 32 = 64.*64 or 128 .*micro 24; or 1 data",
    ):
        check_world(config, 2)


def test_expanded_length_over_the_limit():
    check_length(128, ratio=0.15, states=4, anchors=True, max_positions=512)
    with pytest.raises(
        ConfigError,
        match=r"512 tokens expand to up to 749 positions.*max_positions 512. Set model.max_positions to 749",
    ):
        check_length(512, ratio=0.15, states=4, anchors=True, max_positions=512)


def test_difference_names_only_what_decides_the_result(write):
    old = load_config(write(MINIMAL))
    new = load_config(
        write(MINIMAL), ["--model.layers", "3", "--launch.processes", "2", "--data.prefetch", "0", "--seed", "4"]
    )
    assert config_difference(old, new) == [("seed", 0, 4), ("model.layers", 12, 3)]


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_shipped_configurations_load(path):
    config = load_config(path)
    check_world(config, config.local_processes)
    assert path.stem in (config.name, config.name.removeprefix("ablation_"))


@pytest.mark.parametrize("kind", ["base_text", "large_text", "base_smiles"])
def test_twins_differ_only_in_the_objective(kind):
    exlm, mlm = (flatten(load_config(ROOT / f"configs/pretrain/{model}_{kind}.yaml")) for model in ("exlm", "mlm"))
    assert {key for key in exlm if exlm[key] != mlm[key]} == {
        "name",
        "model.objective",
        "model.states",
        "model.anchors",
        "model.rotary",
        "model.transitions",
        "model.jump_prior",
        "model.jump_width",
        "model.jump_floor",
    }


def test_published_hyper_parameters_of_the_base_recipe():
    config = load_config(ROOT / "configs/pretrain/exlm_base_text.yaml")
    assert (config.batch.sequences, config.schedule.steps, config.schedule.warmup, config.optimizer.lr) == (
        4096,
        23000,
        1380,
        2e-3,
    )
    assert (config.model.layers, config.model.width, config.model.heads, config.model.ffn, config.model.states) == (
        12,
        768,
        12,
        3072,
        4,
    )
    assert config.budget == "dinky-23k"


def test_reference_in_docs_is_the_generated_one():
    assert (ROOT / "docs/configuration.md").read_text() == reference.markdown() + "\n", (
        "run: exlm config schema --markdown > docs/configuration.md"
    )


def test_every_setting_is_explained():
    assert all(description.endswith(".") for _, _, _, description in reference.rows())
    assert {row[0] for row in reference.rows()} <= set(known_keys())
    types = {key: kind for key, kind, _, _ in reference.rows()}
    assert types["masking.schedule"] == "list of [int, ≥ 0; float, > 0, < 1]"
    assert not [key for key, kind in types.items() if "typing" in kind or "FieldInfo" in kind or "class" in kind]
    with pytest.raises(ConfigError, match="Did you mean model"):
        reference.rows("modle")


def test_reading_settings_imports_no_torch():
    heavy = ("torch", "mlflow", "rdkit", "deepspeed")
    code = f"import sys, exlm_dist.cli, exlm_dist.config; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_weights_to_start_from_must_be_there_until_the_run_has_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = ["--init", "runs/none", "--name", "new", "--runs", str(tmp_path)]
    path = str(ROOT / "configs" / "pretrain" / "demo_smiles_exlm.yaml")
    for command in (["config", "check"], ["pretrain"], ["launch", "local"], ["launch", "deepspeed"], ["plan"]):
        extra = ["--gpus", "1"] if command == ["plan"] else []
        assert main([*command, path, *config, *extra]) == 2
        assert "init = 'runs/none': there is no such folder" in capsys.readouterr().err
    checkpoint = tmp_path / "new" / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").touch()
    assert main(["config", "check", path, *config]) == 0


def test_home_folder_in_settings_and_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("name: x\ndata:\n  path: ~/data\nschedule:\n  steps: 1\n")
    (tmp_path / "run.yaml").write_text("base: ~/base.yaml\n")
    config = load_config("~/run.yaml", ["--runs=~/runs", "--init", "~/first"])
    assert (config.data.path, config.runs, config.init) == tuple(
        f"{tmp_path}/{part}" for part in ("data", "runs", "first")
    )
    assert load_config("~/run.yaml").runs == "runs"


def test_what_torch_distributed_launch_adds_to_the_command(capsys):
    path = str(ROOT / "configs" / "pretrain" / "demo_smiles_exlm.yaml")
    for option in ("--local-rank=1", "--local_rank=1"):
        assert main([option, "config", "show", path]) == 0 and "schedule:" in capsys.readouterr().out
