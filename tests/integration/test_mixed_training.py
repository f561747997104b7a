"""Runs over several sources and phases: killed or grown, they end with the bits of a run that had it all from its
beginning."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
from made_run import MOLECULES, make_data, with_sources
from parallel.harness import RankFailed
from training_runs import final_hashes, tiny, train_on

from exlm_dist.checkpoint import reader
from exlm_dist.config import RunConfig
from exlm_dist.data.mixed_order import MixedOrder
from exlm_dist.prepare.smiles import prepare_smiles
from exlm_dist.tracking import read_events
from exlm_dist.training.sample_log import samples_of_steps
from exlm_dist.utils.errors import EXIT_DONE

PHASES = [
    {"steps": 5, "sources": {"added": 1, "drugs": 3}, "masking": {"ratio": 0.3}},
    {"sources": {"added": 1, "drugs": 1}},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {"drugs": make_data(root / "drugs"), "added": make_data(root / "added", repeats=1)}


def mixed(runs: Path, name: str, folders: dict[str, Path], phases=PHASES, **sections) -> RunConfig:
    sources = {name: {"path": str(folder)} for name, folder in folders.items()}
    return with_sources(tiny(runs, name, folders["drugs"], **sections), sources, phases)


def test_sigkill_in_a_later_phase_then_the_same_bits(folders, tmp_path):
    recorded = {"tracking": {"samples": True}}
    whole, killed = (mixed(tmp_path, name, folders, **recorded) for name in ("whole", "killed"))
    assert train_on(whole, 1) == [EXIT_DONE]
    assert train_on(killed, 1, ("step", 0, 7))[0] == -signal.SIGKILL
    assert train_on(killed, 1) == [EXIT_DONE]
    assert final_hashes(killed) == final_hashes(whole)
    steps = samples_of_steps(tmp_path / "killed")
    _, samples = MixedOrder.of(whole, [60, 10]).at(np.arange(96))
    assert steps == samples_of_steps(tmp_path / "whole")
    assert steps == {step: sorted(samples[8 * step : 8 * step + 8].tolist()) for step in range(12)}
    state = reader.read_state(reader.newest_checkpoint(tmp_path / "killed"))
    assert [name for name, _ in state["sources"]] == ["drugs", "added"]
    assert sum(state["progress"]["source_tokens"]) == state["progress"]["tokens"]
    points = {}
    for event in read_events(tmp_path / "killed/events.jsonl"):
        points |= event.get("values", {}) if event["kind"] == "metrics" else {}
    assert (points["progress/drugs/epochs"], points["progress/added/epochs"]) == ((30 + 28) / 60, (10 + 28) / 10)
    assert [points[f"progress/{name}/tokens"] for name in folders] == state["progress"]["source_tokens"]
    each = [points[f"valid/{name}/nll"] for name in folders]
    assert each == [state["evaluation"][f"{name}/nll"] for name in folders]
    assert min(each) <= points["valid/nll"] <= max(each)


def test_a_source_that_is_added_in_a_later_phase_gives_the_run_that_had_it_from_its_beginning(folders, tmp_path):
    """6 steps on one folder, then 6 more with a second one: as at once, and refused where it would change the past."""
    schedule = {"kind": "constant", "warmup": 2}
    phases = [{"steps": 6, "sources": {"drugs": 1}}, {"sources": {"added": 1, "drugs": 1}}]
    begun = tiny(tmp_path, "run", folders["drugs"], schedule={**schedule, "steps": 6})
    grown, at_once = (
        mixed(tmp_path, name, folders, phases, schedule={**schedule, "steps": 12}) for name in ("run", "at_once")
    )
    assert train_on(begun, 1) == [EXIT_DONE]
    too_early = [{**phases[0], "steps": 5}, phases[1]]
    with pytest.raises(RankFailed, match="phases .* no: decides what the steps done have read"):
        train_on(mixed(tmp_path, "run", folders, too_early, schedule={**schedule, "steps": 12}), 1)
    for config in (grown, at_once):
        assert train_on(config, 1) == [EXIT_DONE]
    assert final_hashes(grown) == final_hashes(at_once)
    states = [reader.read_state(reader.newest_checkpoint(tmp_path / name)) for name in ("run", "at_once")]
    assert states[0]["progress"]["source_tokens"] == states[1]["progress"]["source_tokens"]
    assert [change["key"] for change in states[0]["changes"]][-2:] == ["schedule.steps", "phases"]
    back = mixed(tmp_path, "run", dict(reversed(folders.items())), phases, schedule={**schedule, "steps": 20})
    with pytest.raises(RankFailed, match="trained on drugs .*, added .*; given are added .*, drugs"):
        train_on(back, 1)


def test_random_smiles_are_read_a_form_an_epoch(tmp_path):
    (tmp_path / "drugs.smi").write_text("\n".join(MOLECULES * 2))
    random, plain = tmp_path / "random", tmp_path / "plain"
    prepare_smiles([str(tmp_path / "drugs.smi")], random, max_length=64, random_smiles=2, workers=1)
    prepare_smiles([str(tmp_path / "drugs.smi")], plain, max_length=64, tokenizer=random, workers=1)
    sources = {"random": {"path": str(random), "weight": 3}, "plain": {"path": str(plain), "weight": 1}}
    base = tiny(tmp_path, "run", random, schedule={"steps": 4, "warmup": 1}, tracking={"samples": True})
    config = with_sources(base, sources)
    assert train_on(config, 1) == [EXIT_DONE]
    seen = sum(samples_of_steps(tmp_path / "run").values(), [])
    forms = np.bincount([sample // 9 for sample in seen], minlength=4)
    assert forms.tolist() == [9, 9, 6, 8], "24 of 27 random ones, form by form, beside 8 of the canonical folder"
