"""Sources and phases in a file: what is accepted, what it means, and what is said where it makes no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from exlm_dist.config import RunConfig, config_difference, dump_config, load_config
from exlm_dist.config.phases import masking_of, phases_of
from exlm_dist.config.pinned import RESUMABLE, is_among
from exlm_dist.config.ratios import ratio_at
from exlm_dist.utils.errors import ConfigError

SOURCES = {"zinc": {"path": "data/zinc", "weight": 3}, "chembl": {"path": "data/chembl", "weight": 1}}


def loaded(folder: Path, *overrides: str, data: Any = None, **sections: Any) -> RunConfig:
    tree = {
        "name": "run",
        "data": {"sources": SOURCES} if data is None else data,
        "schedule": {"steps": 100},
        **sections,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return load_config(folder / "run.yaml", overrides)


def test_phases_with_bare_weights_and_epochs_survive_being_written_and_read(tmp_path):
    phases = [
        {"steps": 60, "sources": {"zinc": 1}, "masking": {"ratio": 0.3}},
        {"steps": 10},
        {"sources": {"zinc": 0.5, "chembl": {"epochs": 2}}, "masking": {"ratio": 0.1}},
    ]
    config = loaded(tmp_path, phases=phases)
    assert [list(steps)[:: len(steps) - 1] for steps, _ in phases_of(config)] == [[0, 59], [60, 69], [70, 99]]
    assert config.phases[2].sources["chembl"].epochs == 2 and config.phases[2].sources["zinc"].weight == 0.5
    assert config.data.paths == ("data/zinc", "data/chembl")
    assert config.data.described == "zinc: data/zinc, chembl: data/chembl"
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    masking = masking_of(config)
    steps = (0, 59, 60, 69, 70, 99)
    assert [ratio_at(masking.ratio, masking.schedule, step) for step in steps] == [0.3, 0.3, 0.15, 0.15, 0.1, 0.1]
    plain = loaded(tmp_path, data={"path": "data/zinc"})
    assert masking_of(plain) is plain.masking and [steps for steps, _ in phases_of(plain)] == [range(100)]


def test_sources_and_phases_on_the_command_line(tmp_path):
    config = loaded(
        tmp_path, "--data.sources.zinc.weight", "5", "--data.sources.zinc.path", "2024",
        "--phases", "[{steps: 40, sources: {zinc: 1}}, {}]",
    )  # fmt: skip
    assert config.data.sources["zinc"].weight == 5 and config.data.sources["zinc"].path == "2024"
    assert config.phases[0].sources["zinc"].weight == 1 and len(config.phases) == 2


@pytest.mark.parametrize(
    "sections, said",
    [
        ({"data": {}}, "data.path must be given"),
        ({"data": {"path": "a", "sources": SOURCES}}, "are both given: leave out one"),
        ({"data": {"sources": {"a b": SOURCES["zinc"]}}}, "data.sources.a b: a name of a source"),
        ({"data": {"sources": {"a": {"path": "x"}}}}, "data.sources.a: give it a weight or epochs"),
        ({"data": {"sources": {"a": {"path": "x", "epochs": 2}}}}, "give at least one source a weight"),
        ({"data": {"sources": {"a": {"path": "x", "weight": 1, "epochs": 2}}}}, "weight 1 and epochs 2: leave out one"),
        ({"data": {"path": "x"}, "phases": [{"sources": {"a": 1}}]}, "there are none, only data.path"),
        ({"phases": [{"steps": 9, "sources": {"zink": 1}}, {}]}, "phases.0.sources.zink: .* they are zinc, chembl"),
        ({"phases": [{}, {}]}, "phases.0.steps must be given"),
        ({"phases": [{"steps": 9}, {"steps": 91}]}, "phases.1.steps 91: leave it out"),
        ({"phases": [{"steps": 60}, {"steps": 40}, {}]}, "phases.2 would begin after step 100"),
        (
            {"phases": [{"masking": {"ratio": 0.2}}], "masking": {"schedule": [[5, 0.1]]}},
            "masking.schedule and a masking.ratio in phases",
        ),
        (
            {"phases": [{"steps": 9, "masking": {"ratio": 0.05}}, {}], "masking": {"spread": 0.1}},
            "masking.spread 0.1 around ratios from 0.05 to 0.15",
        ),
    ],
)
def test_what_makes_no_sense_is_explained(sections, said, tmp_path):
    with pytest.raises(ConfigError, match=said) as caught:
        loaded(tmp_path, **sections)
    assert len(str(caught.value).splitlines()) == 1


def test_the_line_of_a_mistake_is_named(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "name: run\n"
        "schedule: {steps: 9}\n"
        "data:\n"
        "  sources:\n"
        "    zinc: {path: x, wieght: 1}\n"
        "phases:\n"
        "  - steps: 3\n"
        "    sources: {zinc: some}\n"
        "  - masking: {ratio: 2}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.yaml")
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0].rpartition(":")[2] for line in lines] == ["5", "8", "9"]
    assert "weight" in lines[0] and "a weight (a number) or {epochs: NUMBER}" in lines[1]


def test_places_of_sources_may_change_and_what_is_added_or_missing_is_a_difference(tmp_path):
    old = loaded(tmp_path)
    moved = {"zinc": {**SOURCES["zinc"], "path": "elsewhere"}, "new": {"path": "y", "weight": 1}}
    new = loaded(tmp_path, data={"sources": moved})
    assert {key: (before, after) for key, before, after in config_difference(old, new)} == {
        "data.sources.new.weight": (None, 1.0),
        "data.sources.new.epochs": (None, 0.0),
        "data.sources.chembl.weight": (1.0, None),
        "data.sources.chembl.epochs": (0.0, None),
    }
    assert is_among("data.sources.any-name.path", RESUMABLE) and not is_among("data.sources.path.weight", RESUMABLE)
