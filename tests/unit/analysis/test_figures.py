"""Figures and the report: what they are computed from, and that each one is drawn and recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_run import make_config, make_data, make_run

from exlm_dist.analysis.curves import smooth
from exlm_dist.analysis.inspection import choose, inspect_checkpoint
from exlm_dist.analysis.lengths import Lengths, training_lengths
from exlm_dist.analysis.molecule_examples import _filled
from exlm_dist.analysis.run_report import run_report
from exlm_dist.analysis.state_graph import edge_flow
from exlm_dist.checkpoint.reader import find_checkpoint
from exlm_dist.data.loader import Loader
from exlm_dist.data.order import Order
from exlm_dist.data.recipe import Recipe
from exlm_dist.data.shards import ShardDataset
from exlm_dist.tracking import EventLog, read_events
from exlm_dist.utils.errors import CheckpointError


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory, data) -> list[Path]:
    """An ExLM run and a plain one."""
    runs = tmp_path_factory.mktemp("runs")
    return [
        make_run(make_config(runs, name, data, name), seconds_per_step=seconds)
        for name, seconds in (("exlm", 0.5), ("mlm", 0.3))
    ]


@pytest.fixture(scope="module")
def inspections(pair):
    return inspect_checkpoint(find_checkpoint(pair[0]))[2]


def test_smooth_is_a_centred_mean_without_what_is_not_finite():
    assert smooth(np.array([1.0, 2, 3, 4, 5]), 3).tolist() == [1.5, 2, 3, 4, 4.5]
    assert smooth(np.array([1.0, np.nan, 3]), 3).tolist() == [1, 2, 3]
    assert smooth(np.array([1.0, np.inf]), 1).tolist() == [1.0, np.inf]
    assert len(smooth(np.zeros(0), 5)) == 0


def test_lengths_are_those_the_loader_makes(data, tmp_path):
    config = make_config(tmp_path, "x", data)
    dataset = ShardDataset.open(data, "train")
    loader = Loader(
        dataset,
        Recipe.of(config, dataset.vocab_size),
        order=Order.of(config.data, config.seed, len(dataset)),
        global_batch=8,
        rank=0,
        world=1,
        prefetch=0,
    )
    lengths = training_lengths(config)
    for step in range(2):
        batch = loader.step(step)
        part = slice(8 * step, 8 * step + 8)
        assert batch.num_original_tokens == lengths.original[part].sum()
        assert batch.num_tokens == lengths.expanded[part].sum()


def test_padding_fraction_of_a_rectangle():
    lengths = Lengths(np.zeros(5), np.array([2, 4, 3, 3, 9]))
    assert lengths.padding_fraction(2) == pytest.approx(1 - 12 / 14)
    assert np.isnan(lengths.padding_fraction(6))


def test_sequences_to_look_at_are_of_a_size_that_can_be_drawn():
    assert choose(np.array([2, 7, 6, 20, 6]), np.array([9, 3, 8, 1, 4]), 3) == [4, 2, 1]


def test_inspection_is_a_distribution_over_states_and_a_path_through_them(inspections):
    assert len(inspections) == 3
    for one in inspections:
        n, k = len(one.targets), one.states
        assert one.transitions.shape == (n * k, n * k) and one.posterior.shape == (n, n * k)
        assert np.allclose(one.posterior.sum(1), 1, atol=1e-5)
        assert np.allclose(one.transitions[:-1].sum(1), 1, atol=1e-5)
        assert np.allclose(np.tril(one.transitions), 0)
        assert one.targets[0] == "<s>" and one.targets[-1] == "</s>" and (np.diff(one.positions) > 0).all()
        assert one.path[one.path >= 0].tolist() == list(range(n))
        assert one.text.count("□") == n - 2 and len(one.tokens) == n * k
        assert ((one.token_probability > 0) & (one.token_probability <= 1)).all()


def test_edge_flow_is_conserved(inspections):
    flow = edge_flow(inspections[0])
    assert flow[0].sum() == pytest.approx(1, abs=1e-5) and flow[:, -1].sum() == pytest.approx(1, abs=1e-5)
    assert np.allclose(flow[:, 1:-1].sum(0), flow[1:-1].sum(1), atol=1e-5)


def test_atoms_of_masked_tokens_are_found():
    assert _filled("C\u25a1(=O)\u25a1\u25a1", ["C", "O", ")"]) == ("CC(=O)O)", [1, 3])
    assert _filled("\u25a1c1cc\u25a1cc1", ["[NH3+]", "n"]) == ("[NH3+]c1ccncc1", [0, 4])


def test_report_of_two_runs(pair, capsys):
    page = run_report(pair)
    assert page == pair[0] / "report.md"
    text = page.read_text()
    names = ["quality", "quality_by_compute", "optimisation", "throughput", "alignment_over_training", "lengths"]
    names += ["transitions", "alignment", "molecules", "state_graph_1", "state_graph_2", "state_graph_3"]
    html = page.with_suffix(".html").read_text()
    assert html.count('src="data:image/png;base64,') == len(names)
    for name in names:
        assert f"(plots/{name}.png)" in text
        assert (pair[0] / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        if name != "molecules":
            assert (pair[0] / "plots" / f"{name}.svg").read_text().lstrip().startswith("<?xml")
    assert "nll @100 steps" in text and "unit-test" in text
    assert "| mlm | `model.objective` |" in text and "Not drawn" not in text
    assert "nll @30 s" in capsys.readouterr().out
    logged = [event["path"] for event in read_events(pair[0] / "events.jsonl") if event["kind"] == "artifact"]
    assert logged == ["report.md", "report.html", *(f"plots/{name}.png" for name in names)]


def test_report_of_a_plain_model_has_no_graph_and_old_evaluations_have_the_names_of_today(pair):
    log = EventLog(pair[1] / "events.jsonl")
    log.child_run("before", 100, {"valid/nll": 1.0, "valid/joint_nll": 2.0}, {})
    log.child_run(
        "today",
        100,
        {"valid/nll": 1.0, "valid/joint_nll": 3.0, "valid/objective_nll": 4.0, "valid/alignment_prior_own": 0.5},
        {},
    )
    log.close()
    text = run_report(pair[1:], record=False).read_text()
    assert "lengths.png" in text and "state_graph" not in text and "alignment" not in text
    assert "| before | valid/nll 1.0000, valid/objective_nll 2.0000 |" in text
    assert "| today | valid/nll 1.0000, valid/joint_nll 3.0000, valid/objective_nll 4.0000 |" in text


def test_report_needs_only_the_event_log(tmp_path, data):
    config = make_config(tmp_path / "runs", "exlm", data)
    run = make_run(config)
    for path in sorted((run / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    moved = (run / "config.yaml").read_text().replace(str(data), str(tmp_path / "gone"))
    (run / "config.yaml").write_text(moved)
    text = run_report([run], record=False).read_text()
    assert "quality.png" in text and "Not drawn" in text and "No whole checkpoint" in text and "gone" in text


def test_report_of_a_run_that_logged_nothing(tmp_path, data):
    run = make_run(make_config(tmp_path / "runs", "exlm", data))
    first = (run / "events.jsonl").read_text().splitlines(keepends=True)[0]
    (run / "events.jsonl").write_text(first)
    assert "–" in run_report([run], record=False).read_text()


def test_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="no run folder"):
        run_report([tmp_path])
