"""The tensors of a checkpoint: an index that names every piece, and reading any part of a parameter from the pieces.

`index.json`: `{"moments": ["exp_avg", "exp_avg_sq"], "parameters": {name: {"shape": [...], "pieces": [{"rank": 3,
"range": [0, 4096], "slice": [1, 0, 64]}, ...]}}}`. The piece of `name` by rank 3 is the tensor `name` in
`model-00003.safetensors` and the tensors `exp_avg.name`, `exp_avg_sq.name` in `optimizer-00003.safetensors`, all fp32
and of one length.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.checkpoint.pieces import Piece, Shape, Slice, gap, overlaps, part_shape
from exlm_dist.utils.errors import CheckpointError

INDEX_FILE = "index.json"
#: Bytes of a checkpoint per parameter of the model: fp32 weight and two moments.
BYTES_PER_PARAMETER = 12


def model_file(rank: int) -> str:
    """File with the pieces of the parameters that `rank` wrote."""
    return f"model-{rank:05d}.safetensors"


def optimizer_file(rank: int) -> str:
    """File with the pieces of the moments that `rank` wrote."""
    return f"optimizer-{rank:05d}.safetensors"


def tensor_name(name: str, moment: str | None) -> str:
    """Name in the file of a parameter (None) or one of its moments."""
    return name if moment is None else f"{moment}.{name}"


@dataclass(frozen=True)
class Index:
    """Shapes and pieces of every parameter by canonical name, and which moments each has."""

    shapes: dict[str, Shape]
    pieces: dict[str, list[Piece]]
    moments: tuple[str, ...]

    @staticmethod
    def merged(parts: list[Mapping[str, Any]]) -> Index:
        """The index of what several ranks write, each of `parts` in the form of `as_json`."""
        shapes: dict[str, Shape] = {}
        pieces: dict[str, list[Piece]] = {}
        for part in parts:
            for name, entry in part["parameters"].items():
                if shapes.setdefault(name, tuple(entry["shape"])) != tuple(entry["shape"]):
                    raise CheckpointError(f"parameter {name} has shape {shapes[name]} and {tuple(entry['shape'])}.")
                pieces.setdefault(name, []).extend(Piece.from_json(piece) for piece in entry["pieces"])
        return Index(shapes, pieces, tuple(parts[0]["moments"]))

    def as_json(self) -> dict[str, Any]:
        """As in `index.json`."""
        parameters = {
            name: {"shape": list(self.shapes[name]), "pieces": [piece.as_json() for piece in pieces]}
            for name, pieces in self.pieces.items()
        }
        return {"moments": list(self.moments), "parameters": parameters}

    def as_text(self) -> str:
        """Content of `index.json`."""
        return json.dumps(self.as_json(), separators=(",", ":"), sort_keys=True) + "\n"

    def check(self) -> None:
        """CheckpointError unless the pieces of every parameter make it up exactly: none missing, none twice."""
        for name, shape in self.shapes.items():
            if fault := gap(shape, self.pieces[name]):
                raise CheckpointError(f"the pieces of parameter {name} {list(shape)} do not make it up: {fault}.")


class TensorReader:
    """Reads parts of parameters and moments from the files of a checkpoint, touching only the bytes it needs."""

    def __init__(self, folder: Path) -> None:
        """CheckpointError where the index does not make up every parameter."""
        self.folder = Path(folder)
        self.index = Index.merged([json.loads((self.folder / INDEX_FILE).read_text())])
        self.index.check()
        self._files: dict[str, dict[str, np.ndarray]] = {}

    def read(self, name: str, moment: str | None, part: Slice | None, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop` of the flattened slice `part` (None: all) of a parameter or moment, fp32."""
        shape, target = self.index.shapes[name], Piece(part, start, stop, -1)
        result = np.empty(target.numel, np.float32)
        for piece in self.index.pieces[name]:
            source = None
            for into, out_of, count in overlaps(shape, target, piece):
                if source is None:
                    source = self._piece(name, moment, piece)
                result[into : into + count] = source[out_of : out_of + count]
        return result

    def whole(self, name: str, moment: str | None) -> np.ndarray:
        """A full parameter or moment in its shape, fp32."""
        shape = self.index.shapes[name]
        return self.read(name, moment, None, 0, math.prod(shape)).reshape(shape)

    def _piece(self, name: str, moment: str | None, piece: Piece) -> np.ndarray:
        file = (model_file if moment is None else optimizer_file)(piece.rank)
        if file not in self._files:
            self._files[file] = _open(self.folder / file, read_header(self.folder / file))
        found = self._files[file].get(tensor_name(name, moment))
        if found is None or found.size != piece.numel:
            raise CheckpointError(f"{self.folder / file} does not have {piece.numel} elements of {name}.")
        return found


class WholeTensors(TensorReader):
    """Reads parameters that are whole in a single safetensors file of another origin."""

    def __init__(self, path: Path, names: Mapping[str, str]) -> None:
        """`names`: canonical name of each wanted tensor by its name in the file. CheckpointError where one is not
        there in fp32."""
        self.folder = Path(path).parent
        header = read_header(path)
        for name in names:
            if name not in header or header[name]["dtype"] != "F32":
                found = f"is {header[name]['dtype']}: save the model in float32" if name in header else "is missing"
                raise CheckpointError(f"{path}: tensor {name} {found}.")
        shapes = {ours: tuple(header[name]["shape"]) for name, ours in names.items()}
        self.index = Index(shapes, {name: [Piece(None, 0, math.prod(shape), 0)] for name, shape in shapes.items()}, ())
        flat = _open(path, {name: header[name] for name in names})
        self._files = {model_file(0): {ours: flat[name] for name, ours in names.items()}}


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """`dtype`, `shape` and `data_offsets` of each tensor of a safetensors file. CheckpointError if it is none, or is
    cut off."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size - 8 - length
            if size < 0:
                raise ValueError("it is too short")
            header = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as a safetensors file ({error}).") from error
    if end != size:
        raise CheckpointError(f"{path} is damaged: it has {size} bytes of tensors, not {end}.")
    return tensors


def _open(path: Path, header: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Flat tensors, all fp32, of a safetensors file by name, mapped into memory: only what is accessed is read.
    `header`: of those that are wanted."""
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    if path.stat().st_size == start:
        return {name: np.zeros(0, np.float32) for name in header}
    data = np.memmap(path, np.uint8, mode="r", offset=start)
    return {name: data[slice(*entry["data_offsets"])].view(np.float32) for name, entry in header.items()}


def write_header(tensors: Mapping[str, Shape], metadata: Mapping[str, str] | None = None) -> bytes:
    """Header of a safetensors file with fp32 `tensors`, whose elements follow in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, shape in tensors.items():
        end = offset + math.prod(shape) * 4
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shape_in_file(shape: Shape, piece: Piece) -> Shape:
    """Shape of a piece in its file: that of the slice where the piece is all of it, else flat."""
    part = part_shape(shape, piece.slice)
    return part if piece.numel == math.prod(part) else (piece.numel,)
