"""A replacement for Triton's driver: kernels are compiled for a GPU that need not exist and run by `machine.py`.

Call `install(capability)` before the first launch of a process; tensors are then ordinary CPU tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver as runtime
from triton.tools.tensor_descriptor import TensorDescriptor

from ptx.asynchronous import Tensor2d
from ptx.machine import Machine, prepared
from ptx.memory import GlobalMemory

#: Shared memory that a block may have, by compute capability (CUDA programming guide).
_SHARED_LIMIT = {(8, 0): 163 << 10, (9, 0): 227 << 10}
_FLOATS = {"fp32": "<f", "f32": "<f", "fp64": "<d"}


class EmulatedDriver:
    """What Triton requires of a driver. The function of a kernel is its PTX."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability
        self.utils = self
        self.launcher_cls = _Launcher
        self._text = ""
        knobs.runtime.kernel_load_start_hook = self._remember

    def _remember(self, module: Any, function: Any, name: str, files: dict[str, str], digest: str) -> None:
        self._text = Path(files[f"{name}.ptx"]).read_text()

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, str, int, int, int]:
        """(module, function, registers, spills, maximum number of threads)."""
        return object(), self._text, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        """Nothing was allocated."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Limits that Triton compares with."""
        return {"max_shared_mem": _SHARED_LIMIT[self.capability], "multiprocessor_count": 132, "warpSize": 32}

    def get_current_target(self) -> GPUTarget:
        """The GPU that is compiled for."""
        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        """Its compute capability."""
        return self.capability

    def get_current_device(self) -> int:
        """There is one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Launches are synchronous."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Tensors are on the CPU."""
        return torch.device("cpu")


class _Launcher:
    """Runs one compiled kernel."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.types = list(src.signature.values())
        self.shared = metadata.shared
        self.descriptors = list(getattr(metadata, "tensordesc_meta", None) or [])
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise NotImplementedError("a kernel that asks for scratch memory")

    def __call__(self, x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
        kernel, steps = prepared(function)
        memory = GlobalMemory()
        arguments = self._arguments(rest[4:], memory)
        missing = len(kernel.parameters) - len(arguments)
        assert missing == 2, f"{kernel.name}: {missing} parameters without an argument, not the two for scratch memory"
        Machine(kernel, steps, (x, y, z), [*arguments, 0, 0], memory, self.shared).run()

    def _arguments(self, values: Sequence[Any], memory: GlobalMemory) -> list[Any]:
        """The bits of each, in the order of the kernel's parameters."""
        out: list[Any] = []
        descriptors = iter(self.descriptors)
        for number, (kind, value) in enumerate(zip(self.types, values, strict=True)):
            if kind == "constexpr":
                continue
            if isinstance(value, torch.Tensor):
                out.append(_address(value, memory, f"argument {number}"))
            elif isinstance(value, TensorDescriptor):
                out.append(_descriptor(value, next(descriptors), memory, f"argument {number}"))
                out += [*value.shape, *value.strides]
            elif kind in _FLOATS:
                out.append(int.from_bytes(struct.pack(_FLOATS[kind], value), "little"))
            else:
                out.append(int(value))
        return out


def _address(tensor: torch.Tensor, memory: GlobalMemory, name: str) -> int:
    storage = tensor.untyped_storage()
    start = storage.data_ptr()
    assert start % 16 == 0, "torch aligns what it allocates"
    return memory.place(start, storage.nbytes(), name) + tensor.data_ptr() - start


def _descriptor(value: TensorDescriptor, form: dict[str, Any], memory: GlobalMemory, name: str) -> Tensor2d:
    element = value.base.element_size()
    rows, columns = form["block_size"]
    return Tensor2d(
        _address(value.base, memory, name), tuple(value.shape), value.strides[0] * element, element, (rows, columns),
        form["swizzle"],
    )  # fmt: skip


def install(capability: tuple[int, int]) -> None:
    """Make this process compile for `capability` ((8, 0) or (9, 0)) and run what it compiled here.

    Only the PTX is needed, so ptxas is skipped; such results must not be taken for complete kernels later, so they have
    a cache of their own.
    """
    assert not knobs.runtime.interpret, "the interpreter was chosen already (TRITON_INTERPRET)"
    knobs.cache.dir = str(Path(knobs.cache.dir) / "ptx")
    CUDABackend.make_cubin = lambda *_: b""
    runtime.set_active(EmulatedDriver(capability))
