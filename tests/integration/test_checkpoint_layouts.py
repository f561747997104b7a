"""Saved at one layout, loaded at another, saved there: parameters and moments are equal to the last bit."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from checkpoints import elements_of, write_checkpoint
from made_run import make_data
from parallel.harness import on_ranks
from training_runs import tiny, train_on

from exlm_dist.checkpoint import reader
from exlm_dist.checkpoint.messages import Published
from exlm_dist.checkpoint.pieces import Piece, Slice
from exlm_dist.config import RunConfig
from exlm_dist.export.hf.hf_folder import export_hf
from exlm_dist.parallel.sharded import ShardedParameter
from exlm_dist.utils.errors import EXIT_SAVED

STEP = 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> RunConfig:
    """A run of a few steps whose last checkpoint is cut as no layout of the tests cuts it."""
    folder = tmp_path_factory.mktemp("saved")
    sizes = {"batch": {"sequences": 8, "micro": 1}, "model": {"heads": 4}}
    config = tiny(folder, "run", make_data(folder / "prepared"), **sizes)
    assert train_on(config, 1, ("signal", 0, STEP - 1, signal.SIGTERM)) == [EXIT_SAVED]
    checkpoint = folder / "run/checkpoints" / f"step-{STEP:08d}"
    model, optimizer = reader.load_weights(checkpoint), reader.load_optimizer(checkpoint)
    state = reader.read_state(checkpoint)
    shutil.rmtree(checkpoint)
    write_checkpoint(
        folder / "run",
        STEP,
        model={name: value.numpy() for name, value in model.items()},
        optimizer={name: value.numpy() for name, value in optimizer.items()},
        state=state,
        config=(folder / "run/config.yaml").read_text(),
        tokenizer=folder / "prepared/tokenizer",
        cut=odd_pieces,
    )
    return config


def odd_pieces(shape: tuple[int, ...]) -> list[Piece]:
    """Thirds along the last dimension, each in two ranges, by six ranks."""
    edges = [shape[-1] * third // 3 for third in range(4)]
    pieces = []
    for number, (start, stop) in enumerate(zip(edges, edges[1:])):
        size = int(np.prod(shape[:-1])) * (stop - start)
        cut = Slice(len(shape) - 1, start, stop)
        pieces += [Piece(cut, 0, size // 4, 2 * number), Piece(cut, size // 4, size, 2 * number + 1)]
    return pieces


def load_and_save(process, settings, cases):
    """For each (ZeRO stage, dtype, degrees) in turn: resume, compare the weights that the model works with, save as the
    next step, and train meanwhile. Stage 3 partitions every parameter in bf16; in fp32 it keeps the small ones whole,
    as is its default."""
    from exlm_dist.parallel.layout import Layout
    from exlm_dist.parallel.process_groups import Grid
    from exlm_dist.training.engine import base as engines
    from exlm_dist.training.resources import Resources
    from exlm_dist.training.session import build_session
    from exlm_dist.training.starting_point import find_starting_point

    plain, reads = engines.deepspeed_config, count_reads()

    def all_partitioned(*arguments):
        result = plain(*arguments)
        result["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return result

    for number, (stage, dtype, degrees) in enumerate(cases):
        engines.deepspeed_config = all_partitioned if (stage, dtype) == (3, "bf16") else plain
        config = RunConfig.model_validate(
            settings
            | {
                "runs": f"{settings['runs']}/{number}",
                "parallel": {"zero": stage, **degrees},
                "precision": {"dtype": dtype},
            }
        )
        grid = Grid.make(Layout.of(config.parallel, process.world), process.rank)
        placed = dataclasses.replace(process, grid=grid)
        with Resources() as resources:
            start = find_starting_point(config, placed, resources)
            reads.clear()
            with nothing_drawn():
                session = build_session(config, placed, start, resources)
            assert session.step == STEP
            if stage in (1, 2) and not degrees:  # with degrees also what other ranks save for this one
                owned = sum(part.numel for part in session.checkpointer.saver._parts)
                assert sum(reads) == 3 * owned, "it has read other elements than its own parameters and moments"
            compare_weights(session.engine, Path(config.runs) / "run/checkpoints" / f"step-{STEP:08d}")
            session.step += 1
            delay_copy(session.checkpointer.saver)
            session.checkpointer.save(session.step, session.evaluation)
            change_every_tensor(session)
            while session.checkpointer.saving:
                session.checkpointer.attend()
            session.engine.close()
            resources.status = "KILLED"


def count_reads():
    """A list that grows by the number of elements of each read from a checkpoint."""
    from exlm_dist.checkpoint.tensors import TensorReader

    plain, numbers = TensorReader.read, []

    def read(reader, name, moment, part, start, stop):
        numbers.append(stop - start)
        return plain(reader, name, moment, part, start, stop)

    TensorReader.read = read
    return numbers


@contextlib.contextmanager
def nothing_drawn():
    """Inside, no weights may be drawn that a checkpoint would then replace: at 7B that takes a minute."""
    from exlm_dist.model import initialisation

    plain = initialisation.seed_from
    initialisation.seed_from = None
    yield
    initialisation.seed_from = plain


def delay_copy(saver):
    """From now on saves copy no element before something waits for the copy. Were it not the update of the next step,
    they would copy what it has made of the elements."""
    begin_fill, settle, waited_for = saver._fill, saver._writer.settle, threading.Event()

    def settle_seen():
        if saver._writer._filling is not None:
            waited_for.set()
        settle()

    def late_fill():
        fill = begin_fill()
        return lambda: waited_for.wait(30) and fill()

    saver._fill, saver._writer.settle = late_fill, settle_seen


def change_every_tensor(session):
    """One training step, which leaves nothing as it was but the moments of rows that got no gradient."""
    import torch

    from exlm_dist.training.engine import state as checkpoint

    tensors = checkpoint.owned_tensors(session.engine, session.checkpointer.saver._parts)
    before = [values.clone() for values in tensors]
    session.train_step()
    unchanged = [number for number, pair in enumerate(zip(before, tensors)) if torch.equal(*pair)]
    assert len(unchanged) < len(tensors) / 10, unchanged


def compare_weights(engine, folder):
    """What the model of this rank works with is its part of the saved weights, in the working precision."""
    import deepspeed
    import torch

    weights = reader.load_weights(folder)
    for sharded in engine.parameters:
        local = sharded.parameter
        with deepspeed.zero.GatheredParameters([local], enabled=engine.zero == 3):
            size = int(np.prod(sharded.part_shape))
            part = elements_of(weights[sharded.name].numpy(), Piece(sharded.slice, 0, size, 0))
            wanted = torch.from_numpy(part.copy()).to(local.dtype)
            assert torch.equal(local.detach().reshape(-1)[:size], wanted), sharded.name


FP32 = [(stage, "fp32", {}) for stage in range(4)]
WORLDS = {
    1: [(0, "fp32", {}), (1, "bf16", {}), (3, "fp32", {})],
    2: [
        *FP32,
        (0, "bf16", {}),
        (1, "bf16", {}),
        (3, "bf16", {}),
        (2, "fp32", {"offload": True}),
        (3, "fp32", {"offload": True}),
        (1, "fp32", {"tensor": 2}),
        (0, "fp32", {"tensor": 2, "sequence": True}),
        (1, "bf16", {"pipeline": 2}),
    ],
    4: [
        *FP32,
        (1, "fp32", {"tensor": 2, "data": 2}),
        (3, "fp32", {"tensor": 2, "data": 2}),
        (1, "fp32", {"tensor": 2, "pipeline": 2}),
        (1, "fp32", {"pipeline": 2, "data": 2}),
        (1, "bf16", {"tensor": 4}),
    ],
}


@pytest.mark.parametrize("world", WORLDS)
def test_any_layout_loads_any_pieces_and_saves_them_again(world, saved, tmp_path):
    cases = WORLDS[world]
    for number in range(len(cases)):
        shutil.copytree(Path(saved.runs) / "run", tmp_path / str(number) / "run")
    settings = saved.model_dump() | {"runs": str(tmp_path)}
    on_ranks(load_and_save, world, settings, cases, timeout=150)
    wanted = exported(Path(saved.runs) / "run", tmp_path / "out")
    wanted["README.md"] = wanted["README.md"].replace(f"step {STEP}".encode(), f"step {STEP + 1}".encode())
    for number, case in enumerate(cases):
        folder = tmp_path / str(number) / "run/checkpoints"
        before, after = (tensors_of(folder / f"step-{step:08d}") for step in (STEP, STEP + 1))
        assert before.keys() == after.keys() and len(before) > 30
        assert [name for name in before if before[name].tobytes() != after[name].tobytes()] == [], case
        assert len(list((folder / f"step-{STEP + 1:08d}").glob("optimizer-*"))) == world
        assert exported(folder.parent, tmp_path / f"out-{number}") == wanted, case


def exported(run: Path, out: Path) -> dict[str, bytes]:
    """Every file of an export for the transformers library."""
    export_hf(run, out)
    return {file.name: file.read_bytes() for file in out.iterdir()}


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    tensors = reader.load_weights(folder) | reader.load_optimizer(folder)
    return {name: value.numpy() for name, value in tensors.items()}


SHAPES = {"table": (10, 6), "across": (4, 12), "along": (12, 4), "vector": (12,), "common": (5,), "tied": (3, 2)}
CUTS = {"table": 0, "across": 1, "along": 0, "vector": 0}


class Sliced:
    """Stands for an engine at ZeRO 0: hand-made slices of given tensors for a tensor-parallel degree."""

    zero = 0

    def __init__(self, process, degree, values):
        import torch

        self.process, self.dtype = process, torch.float32
        self.replica = process.rank // degree, process.world // degree
        number, values = process.rank % degree, values or {}
        self.parameters = []
        for name, shape in SHAPES.items():
            cut, local = None, list(shape)
            if name in CUTS:
                dim = CUTS[name]
                local[dim] = -(-shape[dim] // degree)  # the table is padded where the degree does not divide it
                start = min(number * local[dim], shape[dim])
                cut = Slice(dim, start, min(start + local[dim], shape[dim]))
            parameter = torch.nn.Parameter(torch.full(local, torch.nan))
            self.parameters.append(ShardedParameter(name, parameter, shape, cut, saved=cut is not None or number == 0))
        # A copy of a matrix that another stage saves; it is loaded all the same.
        copy = torch.nn.Parameter(torch.full(SHAPES["tied"], torch.nan))
        self.parameters.append(ShardedParameter("tied", copy, SHAPES["tied"], None, saved=False))
        self.inner_optimizer = torch.optim.AdamW([sharded.parameter for sharded in self.parameters], lr=0.0)
        for sharded in self.parameters:
            sharded.parameter.grad = torch.zeros_like(sharded.parameter)
        self.inner_optimizer.step()
        self.fill(values)

    def fill(self, values):
        """Set the local tensors from full arrays, by slicing."""
        import torch

        state = self.inner_optimizer.state
        for sharded in self.parameters:
            for moment in (None, "exp_avg", "exp_avg_sq") if values else ():
                part = torch.from_numpy(values[sharded.name if moment is None else f"{moment}.{sharded.name}"])
                if (cut := sharded.slice) is not None:
                    part = part.narrow(cut.dim, cut.start, cut.stop - cut.start)
                local = sharded.parameter.data if moment is None else state[sharded.parameter][moment]
                local.zero_()
                local[tuple(slice(0, size) for size in part.shape)] = part

    def locals(self):
        """Copies of all local tensors."""
        state = self.inner_optimizer.state
        local = [sharded.parameter for sharded in self.parameters]
        return [
            tensor.detach().clone()
            for parameter in local
            for tensor in (parameter, state[parameter]["exp_avg"], state[parameter]["exp_avg_sq"])
        ]


def save_sliced(process, degree, run, values):
    from exlm_dist.config.schema import CheckpointConfig
    from exlm_dist.training.saver import Saver

    (Path(run) / "events.jsonl").touch()
    about = {"config": "name: x\n", "tokenizer": Path(run).parent / "tokenizer", "log": Path(run) / "events.jsonl"}
    saver = Saver(Path(run), Sliced(process, degree, values), CheckpointConfig(timeout=30), **about)
    assert saver.start(1, {"step": 1, "evaluation": None, "optimizer_step": 1}) is None
    saved = saver.wait()
    saver.close()
    assert isinstance(saved.outcome, Published)
    return sum(part.numel for part in saver._parts)


def load_sliced(process, degree, run, values):
    import torch

    from exlm_dist.checkpoint.tensors import TensorReader
    from exlm_dist.training.engine import state as checkpoint

    folder = reader.newest_checkpoint(Path(run))
    engine, wanted = Sliced(process, degree, None), Sliced(process, degree, values)
    index = checkpoint.gather_index(engine, checkpoint.owned_ranges(engine))
    checkpoint.check_index(index, TensorReader(folder).index)
    checkpoint.restore(engine, TensorReader(folder), reader.read_state(folder))
    assert all(torch.equal(one, other) for one, other in zip(engine.locals(), wanted.locals()))


@pytest.mark.parametrize("world, degree", [(2, 2), (4, 2), (4, 4), (3, 3), (2, 1)])
def test_slices_and_paddings_of_tensor_parallel_ranks(world, degree, tmp_path):
    """Rows, columns, a padded table, replicated parameters, and a tied copy; replicas divide up the saving."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "tokenizer").mkdir()
    dice = np.random.default_rng(0)
    values = {
        prefix + name: dice.standard_normal(shape, np.float32)
        for prefix in ("", "exp_avg.", "exp_avg_sq.")
        for name, shape in SHAPES.items()
    }
    counts = on_ranks(save_sliced, world, degree, str(tmp_path / "run"), values)
    assert sum(counts) == sum(int(np.prod(shape)) for shape in SHAPES.values())
    # Ranks with the same slices divide them up evenly.
    assert all(max(counts[first::degree]) - min(counts[first::degree]) <= 1 for first in range(degree))
    found = tensors_of(reader.newest_checkpoint(tmp_path / "run"))
    assert found.keys() == values.keys()
    assert all(np.array_equal(found[name], values[name]) for name in values)
    for other_world, other_degree in ((1, 1), (4, 4)):
        on_ranks(load_sliced, other_world, other_degree, str(tmp_path / "run"), values)
