"""Checkpoints made without an engine, as one or several ranks would write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.checkpoint import rank_files, storage
from exlm_dist.checkpoint.pieces import Piece, overlaps
from exlm_dist.checkpoint.tensors import Index, model_file, optimizer_file, shape_in_file, tensor_name
from exlm_dist.checkpoint.weights_only import write_arrays
from exlm_dist.utils.checkpoint_names import checkpoint_folder

Arrays = Mapping[str, np.ndarray]
Cut = Callable[[tuple[int, ...]], list[Piece]]


def whole(shape: tuple[int, ...]) -> list[Piece]:
    """One rank that has all of it."""
    return [Piece(None, 0, int(np.prod(shape)), 0)]


def elements_of(array: np.ndarray, piece: Piece) -> np.ndarray:
    """What a piece covers of a full array: the definition, by slicing."""
    if piece.slice is not None:
        array = array.take(range(piece.slice.start, piece.slice.stop), axis=piece.slice.dim)
    return array.reshape(-1)[piece.start : piece.stop]


def full_state(engine: Any) -> dict[str, np.ndarray]:
    """Parameters and moments (`exp_avg.<name>`, ...) of an engine, full, on every rank: what a save and a load make of
    them, without the files. A collective; after the first step."""
    import torch
    import torch.distributed as dist

    from exlm_dist.training.engine import state as checkpoint

    parts = checkpoint.owned_ranges(engine)
    index = checkpoint.gather_index(engine, parts)
    sizes = [part.numel for part in parts]
    moments = (None, *checkpoint.MOMENTS)
    elements = torch.full((len(moments) * sum(sizes),), torch.nan)
    checkpoint.copy_out(checkpoint.owned_tensors(engine, parts), elements)
    keys = [(moment, part.sharded.name) for moment in moments for part in parts]
    mine = dict(zip(keys, (values.numpy() for values in elements.split(sizes * len(moments)))))
    every: list[Any] = [None] * engine.process.world
    dist.all_gather_object(every, mine)
    result = {}
    for moment in moments:
        for name, shape in index.shapes.items():
            whole_of_it = Piece(None, 0, int(np.prod(shape)), 0)
            full = result[tensor_name(name, moment)] = np.full(shape, np.nan, np.float32)
            for piece in index.pieces[name]:
                for into, out_of, count in overlaps(shape, whole_of_it, piece):
                    full.reshape(-1)[into : into + count] = every[piece.rank][moment, name][out_of : out_of + count]
    return result


def write_checkpoint(
    run_folder: Path,
    step: int,
    *,
    model: Arrays,
    optimizer: Arrays,
    state: Mapping[str, Any],
    config: str,
    tokenizer: Path,
    cut: Cut = whole,
) -> Path:
    """Write and publish in this process. `optimizer`: `exp_avg.<name>`, ... of every parameter, or nothing; `cut`: the
    pieces of a parameter of a shape."""
    pieces = {name: cut(array.shape) for name, array in model.items()}
    moments = tuple(dict.fromkeys(name.split(".")[0] for name in optimizer))
    index = Index({name: array.shape for name, array in model.items()}, pieces, moments)
    target = checkpoint_folder(run_folder, step)
    size = 4 * sum(array.size for arrays in (model, optimizer) for array in arrays.values())
    temporary = storage.begin(target, size)
    small = rank_files.SmallFiles.of_run(index.as_text(), state, config, Path(tokenizer))
    files: dict[str, dict[str, np.ndarray]] = {}
    for moment, arrays, file_of in [(None, model, model_file), *((m, optimizer, optimizer_file) for m in moments)]:
        for name in model:
            array = arrays[tensor_name(name, moment)]
            for piece in pieces[name]:
                part = elements_of(array, piece).reshape(shape_in_file(array.shape, piece))
                files.setdefault(file_of(piece.rank), {})[tensor_name(name, moment)] = part
    entries = write_arrays(temporary, files, small)
    storage.publish(temporary, target, step, entries)
    return target
