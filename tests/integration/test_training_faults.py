"""Bad checkpoints, bad data, wrong settings, lost ranks: every rank says what and where within seconds."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from made_run import make_data
from parallel.harness import RankFailed, run_processes
from prepared_folder import overwrite
from training_runs import _before_step, _train, final_hashes, log_of, tiny, train_on

from exlm_dist.checkpoint import reader
from exlm_dist.config import RunConfig
from exlm_dist.data.shards import ShardDataset
from exlm_dist.tracking import EVENTS, read_events
from exlm_dist.training.run_folder import RunFolder
from exlm_dist.utils.errors import EXIT_DATA, EXIT_DONE, EXIT_RETRY, EXIT_SAVED, EXIT_STOP, EXIT_USAGE


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "prepared")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run that finished."""
    config = tiny(tmp_path_factory.mktemp("runs"), "finished", data)
    assert train_on(config, 2) == [EXIT_DONE] * 2
    return config


def copy_of(finished: RunConfig, runs: Path, **changes) -> RunConfig:
    shutil.copytree(Path(finished.runs) / finished.name, runs / finished.name)
    return finished.model_copy(update={"runs": str(runs), **changes})


def failure_of(config: RunConfig, world: int = 2, function=_train, *arguments) -> tuple[str, list[int]]:
    with pytest.raises(RankFailed) as caught:
        run_processes(
            function, world, config.model_dump(), *(arguments or ([None] if function is _train else [])), timeout=60
        )
    return str(caught.value), caught.value.codes


def flip_a_bit(path: Path, position: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 0x10
    path.write_bytes(content)


def test_damaged_records_are_replaced_alike_on_any_ranks_counted_and_listed(data, tmp_path):
    damaged = Path(shutil.copytree(data, tmp_path / "data"))
    train = ShardDataset.open(damaged, "train")
    for sample in range(0, len(train), 3):
        shard, record = train.record(sample)
        overwrite(Path(train.place(shard)), int(record["offset"]), b"\xff")
    train.close()
    samples, counts = [], []
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        config = tiny(tmp_path / str(world), "damaged", damaged)
        config = config.model_copy(update={"data": config.data.model_copy(update={"max_bad_records": 1.0})})
        assert train_on(config, world) == [EXIT_DONE] * world
        run = Path(config.runs) / config.name
        metrics = [event["values"] for event in read_events(run / EVENTS) if event["kind"] == "metrics"]
        counts.append([values["data/bad_records"] for values in metrics if "data/bad_records" in values])
        tables = sorted((run / "quarantine").glob("rank-*.tsv"))
        listed = [line.split("\t")[2] for path in tables for line in path.read_text().splitlines()[1:]]
        assert len(tables) == world and counts[-1] == sorted(counts[-1]) and counts[-1][-1] == len(listed) > world
        samples.append(set(listed))
    assert samples[0] == samples[1]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(finished, tmp_path):
    config = copy_of(finished, tmp_path)
    flip_a_bit(tmp_path / "finished/checkpoints/step-00000012/model-00001.safetensors")
    assert train_on(config, 2) == [EXIT_DONE] * 2
    assert final_hashes(config) == final_hashes(finished)
    assert "step-00000012" in (text := log_of(config)) and "model-00001.safetensors is damaged" in text


def test_all_checkpoints_damaged(finished, tmp_path):
    config = copy_of(finished, tmp_path)
    for folder in reader.checkpoint_folders(tmp_path / "finished"):
        flip_a_bit(folder / "COMPLETE", 0.0)
    text, codes = failure_of(config)
    assert codes == [EXIT_STOP] * 2 and "none of the 2 checkpoints" in text and "step-00000008" in text


def test_a_finished_run_says_so(finished):
    before = (Path(finished.runs) / "finished/events.jsonl").read_bytes()
    assert train_on(finished, 1) == [EXIT_DONE]
    assert (Path(finished.runs) / "finished/events.jsonl").read_bytes() == before


def test_other_data_names_both_fingerprints(finished, tmp_path):
    other = make_data(tmp_path / "other", extra_token="[K+]")
    config = copy_of(finished, tmp_path, data=finished.data.model_copy(update={"path": str(other)}))
    text, codes = failure_of(config)
    state = reader.read_state(reader.newest_checkpoint(Path(finished.runs) / "finished"))
    assert (
        codes == [EXIT_STOP] * 2
        and "data fingerprint" in text
        and state["data_fingerprint"] in text
        and str(other) in text
    )


def test_other_settings_give_a_table(finished, tmp_path):
    config = copy_of(finished, tmp_path, seed=5)
    text, codes = failure_of(config)
    assert codes == [EXIT_STOP] * 2 and "was trained to step 12 with other settings" in text and "`name`" in text
    assert any(line.split()[:4] == ["seed", "0", "5", "no:"] for line in text.splitlines())


def test_two_launches_of_one_run(data, tmp_path):
    config = tiny(tmp_path, "busy", data, launch={"timeout": 5})
    folder = RunFolder.open(config)
    text, codes = failure_of(config)
    folder.close()
    assert codes == [EXIT_STOP] * 2 and "written by another process" in text and str(os.getpid()) in text


def test_no_data(data, tmp_path):
    text, codes = failure_of(tiny(tmp_path, "none", tmp_path / "nothing"))
    assert codes == [EXIT_DATA] * 2 and "exlm prepare" in text


def test_batch_that_does_not_divide_by_the_ranks(data, tmp_path):
    text, codes = failure_of(tiny(tmp_path, "odd", data), world=3)
    assert codes == [EXIT_USAGE] * 3 and "batch.sequences 8" in text and "6" in text


def test_fp16_on_a_cpu(data, tmp_path):
    text, codes = failure_of(tiny(tmp_path, "half", data, precision={"dtype": "fp16"}))
    assert codes == [EXIT_USAGE] * 2 and "fp16 is not supported on a CPU" in text


def fault_on_rank_1(rank, settings):
    from exlm_dist.utils.errors import DataError

    def fault(step):
        if step == 5 and rank == 1:
            raise DataError("shard 7 is gone")

    _before_step(fault)
    return _train(rank, settings, None)


def test_an_error_on_one_rank_ends_the_others(data, tmp_path):
    text, codes = failure_of(tiny(tmp_path, "fault", data), 2, fault_on_rank_1)
    assert codes == [EXIT_RETRY, EXIT_DATA] and "shard 7 is gone" in text and "another rank ended" in text
    statuses = [event["status"] for event in read_events(tmp_path / "fault/events.jsonl") if event["kind"] == "status"]
    assert statuses[-1] == "FAILED"


def stopped_rank(rank, settings):
    _before_step(lambda step: os.kill(os.getpid(), signal.SIGSTOP) if step == 5 and rank == 1 else None)
    return _train(rank, settings, None)


def test_a_hanging_rank_is_noticed_within_the_limit(data, tmp_path):
    text, codes = failure_of(tiny(tmp_path, "hang", data, launch={"timeout": 5}), 2, stopped_rank)
    assert codes[0] == EXIT_RETRY and "launch.timeout" in text


def left_out(rank, settings, which):
    """On rank 1, sequence 0 of every micro-batch of step `which` has a likelihood of zero. A save ends only where
    training waits for it."""
    import torch

    from exlm_dist.training.checkpointer import Checkpointer
    from exlm_dist.training.engine import training_module as objective

    Checkpointer.attend = lambda self: None

    plain, now = objective.loss_sum, {"step": -1}
    _before_step(lambda step: now.update(step=step))

    def loss_sum(stream, reduction):
        if rank == 1 and now["step"] == which:
            stream = stream.replace(log_likelihood=stream.log_likelihood.index_fill(0, torch.tensor([0]), -torch.inf))
        return plain(stream, reduction)

    objective.loss_sum = loss_sum
    return _train(rank, settings, None)


def test_sequences_without_a_likelihood_are_named_and_stop_the_run(data, tmp_path):
    text, codes = failure_of(tiny(tmp_path, "invalid", data), 2, left_out, 4)
    assert (
        codes == [EXIT_STOP] * 2
        and "step 5: 2 of 8 sequences have no finite likelihood: samples " in text
        and "loss.max_invalid" in text
        and "from the checkpoint of step 4" in text
        and "--optimizer.lr 0.0005 --allow-changes" in text
    )


def test_few_of_them_are_left_out_and_counted(data, tmp_path):
    config = tiny(tmp_path, "few", data, loss={"max_invalid": 0.5})
    assert run_processes(left_out, 2, config.model_dump(), 5) == [EXIT_DONE] * 2
    events = list(read_events(tmp_path / "few/events.jsonl"))
    name = "train/invalid_sequences"
    counts = {
        event["step"]: event["values"][name]
        for event in events
        if name in event.get("values", {}) and event["kind"] == "metrics"
    }
    assert counts[6] == 2 and counts[9] == 0
    assert any("invalid_step_6" in event["values"] for event in events if event["kind"] == "tags")
    assert "They were left out" in log_of(config)


def full_disk(rank, settings, full_from):
    """From step `full_from` on, the file system has one byte free."""
    from exlm_dist.checkpoint import storage as checkpoint_files

    now = {"step": -1}
    _before_step(lambda step: now.update(step=step + 1))
    plain = checkpoint_files.shutil.disk_usage
    usage = type("Usage", (), {"free": 1})
    checkpoint_files.shutil.disk_usage = lambda path: usage if now["step"] >= full_from else plain(path)
    return _train(rank, settings, None)


def test_disk_full_is_an_alarm_until_a_checkpoint_is_needed(data, tmp_path):
    config = tiny(tmp_path, "full", data)
    text, codes = failure_of(config, 2, full_disk, 8)
    assert codes == [EXIT_STOP] * 2 and "MB are free" in text
    assert "Training goes on" in log_of(config)
    folders = [folder.name for folder in (tmp_path / "full/checkpoints").iterdir() if folder.is_dir()]
    assert folders == ["step-00000004"]


def test_disk_full_at_the_first_save(data, tmp_path):
    text, codes = failure_of(tiny(tmp_path, "full", data), 1, full_disk, 4)
    assert codes == [EXIT_STOP] and "MB are free" in text


@pytest.mark.parametrize(
    "rank, point, why", [(1, "fsync:1:error", "No space left on device"), (1, "write:3:kill", "exit code -9")]
)
def test_a_writer_that_fails_is_an_alarm_and_nothing_is_published(rank, point, why, data, finished, tmp_path):
    """At the first save of a launch that has an older checkpoint: step 8 is missing, step 12 is saved."""
    config = tiny(tmp_path, "writer", data, evaluation={"every": 0})
    assert train_on(config, 2, ("signal", 0, 5, signal.SIGTERM)) == [EXIT_SAVED] * 2
    assert train_on(config, 2, ("writer", rank, point)) == [EXIT_DONE] * 2
    steps = [reader.step_of(folder) for folder in reader.checkpoint_folders(tmp_path / "writer")]
    assert steps == [12, 6] and f"step 8 was not saved: rank {rank}: " in (text := log_of(config)) and why in text
    assert not list((tmp_path / "writer/checkpoints").glob(".t*"))
    assert final_hashes(config) == final_hashes(finished)
    tags = [event["values"] for event in read_events(tmp_path / "writer/events.jsonl") if event["kind"] == "tags"]
    assert any(why in values.get("save_failed_step_8", "") for values in tags)


def test_a_writer_that_is_lost_after_the_rename_has_published(data, finished, tmp_path):
    config = tiny(tmp_path, "writer", data, evaluation={"every": 0})
    assert train_on(config, 2, ("writer", 0, "replace:1:kill")) == [EXIT_DONE] * 2
    assert "exit code -9" in (text := log_of(config)) and "was not saved" not in text
    steps = [reader.step_of(folder) for folder in reader.checkpoint_folders(tmp_path / "writer")]
    assert steps == [12, 8] and final_hashes(config) == final_hashes(finished)


def test_a_writer_that_hangs_at_the_last_save_ends_the_run_within_the_limit(data, tmp_path):
    config = tiny(tmp_path, "hang", data, checkpoint={"every": 100, "timeout": 2}, launch={"timeout": 60})
    text, codes = failure_of(config, 2, _train, ("writer", 1, "fsync:1:hang"))
    assert codes == [EXIT_RETRY] * 2
    assert "step 12 was not saved: rank 1" in text and "did not finish within checkpoint.timeout, 2 s" in text
    assert not reader.checkpoint_folders(tmp_path / "hang")


def test_the_next_save_waits_for_the_previous_one(data, tmp_path):
    """The writer of rank 0 takes a second for one file of step 4; training reaches step 8 by then, and waits."""
    config = tiny(tmp_path, "slow", data, evaluation={"every": 0})
    assert run_processes(_train, 2, config.model_dump(), ("slow", 0, "fsync:1:slow"), timeout=60) == [EXIT_DONE] * 2
    steps = [reader.step_of(folder) for folder in reader.checkpoint_folders(tmp_path / "slow")]
    assert steps == [12, 8] and "not saved" not in log_of(config)


def poisoned(rank, settings):
    """A parameter of rank 1 becomes infinite after step 3."""
    from exlm_dist.training.engine.zero_engine import ZeroEngine

    plain, count = ZeroEngine.train, {"steps": 0}

    def train(engine, *arguments, **keywords):
        result = plain(engine, *arguments, **keywords)
        count["steps"] += 1
        if count["steps"] == 4 and rank == 1:
            engine.parameters[-1].parameter.data.fill_(float("inf"))
        return result

    ZeroEngine.train = train
    return _train(rank, settings, None)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_parameters_that_are_not_finite_are_never_saved(asynchronous, data, tmp_path):
    """With asynchronous saves, the sequences that such parameters give no likelihood may stop the run first."""
    checkpoint = {"every": 4, "asynchronous": asynchronous}
    text, codes = failure_of(tiny(tmp_path, "poison", data, parallel={"zero": 0}, checkpoint=checkpoint), 2, poisoned)
    assert codes == [EXIT_STOP] * 2
    assert "is not finite after step 4" in text or (asynchronous and "have no finite likelihood" in text)
    assert not reader.checkpoint_folders(tmp_path / "poison")
