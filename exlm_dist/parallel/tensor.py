"""Tensor and sequence parallelism on megatron-core: the one place that imports it, used where the degree is above 1.

`split` cuts a model that was built whole: linear layers become megatron's column- and row-parallel ones, the table of
words its vocabulary-parallel embedding, and the layers are told what part of the model they are (`parallel/part.py`).
Formulas of what is sent: docs/parallelism.md.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from exlm_dist.checkpoint.pieces import Slice
from exlm_dist.parallel.compiler import decorators_without_compiler
from exlm_dist.parallel.region import Part
from exlm_dist.parallel.sharded import has_sharding, set_sharding

with warnings.catch_warnings(), decorators_without_compiler():
    warnings.simplefilter("ignore")  # of packages that are not needed
    import megatron.core.utils
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        gather_from_sequence_parallel_region,
        layers,
        mappings,
        reduce_from_tensor_model_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
        set_tensor_model_parallel_attributes,
    )


def split(model: nn.Module, group: dist.ProcessGroup, *, sequence: bool = False) -> None:
    """Cut `model`, or some layers of one, down in place to what this rank of the tensor-parallel `group` holds.

    New parameters are on the CPU, in fp32 and without a value; so are those held whole if they were on the meta device.
    Each gets its extent (read by `sharded_parameters`) and, where it is cut, megatron's `tensor_model_parallel`,
    by which gradient norms count the others once. `sequence`: between the matrices each rank holds a slice of the rows.
    """
    _prepare(group)
    _Cutter(group, sequence).cut(model)


class TensorPart(Part):
    """The part of one rank of a tensor-parallel group."""

    whole = False

    def __init__(self, group: dist.ProcessGroup, sequence: bool) -> None:
        self.group, self.sequence = group, sequence
        self.rank, self.degree = group.rank(), group.size()
        self.row_multiple = self.degree if sequence else 1
        self.table: VocabParallelEmbedding | None = None

    def first(self, held: int) -> int:
        """See `Part`."""
        return self.rank * held

    def first_row(self, held: int) -> int:
        """See `Part`."""
        return self.rank * held if self.sequence else 0

    def all_rows(self, hidden: Tensor) -> Tensor:
        """See `Part`."""
        if not self.sequence:
            return hidden
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=self.group)

    def take_rows(self, hidden: Tensor, index: Tensor) -> Tensor:
        """See `Part`."""
        if not self.sequence:
            return super().take_rows(hidden, index)
        every = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.group)
        return super().take_rows(every, index.chunk(self.degree)[self.rank])

    def entering(self, x: Tensor) -> Tensor:
        """See `Part`."""
        return _Entering.apply(x, self.group)

    def embed(self, ids: Tensor, weight: Tensor) -> Tensor:
        """See `Part`; `weight` is that of the table."""
        hidden = self.table(ids[None])  # [1, R, D]; [R / degree, 1, D] under sequence parallelism
        return hidden.squeeze(1 if self.sequence else 0)

    def total(self, x: Tensor) -> Tensor:
        """See `Part`."""
        return _summed(x, self.group)

    def log_sum(self, x: Tensor) -> Tensor:
        """See `Part`."""
        return _LogSum.apply(x, self.group)

    def best(self, values: Tensor, ids: Tensor) -> Tensor:
        """See `Part`; of equal values the one of the first rank."""
        largest = values.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        ids = ids.masked_fill(values < largest, torch.iinfo(ids.dtype).max)
        dist.all_reduce(ids, dist.ReduceOp.MIN, group=self.group)
        return ids


class Column(ColumnParallelLinear):
    """Rows of a linear layer's weight; a layer that passes its bias on (kernels/linear) passes on this rank's part."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """x [R, K], or this rank's rows of it under sequence parallelism -> [R, N / degree]; and a bias to pass on."""
        out, bias = super().forward(x)
        return out if bias is None else (out + bias.detach(), bias.view_as(bias))


class Row(RowParallelLinear):
    """Columns of a linear layer's weight. `product` (x, weight, bias, more) is the layer's own."""

    def __init__(self, inputs: int, outputs: int, *, product: Callable[..., Tensor], **shared: Any) -> None:
        super().__init__(inputs, outputs, bias=True, input_is_parallel=True, skip_bias_add=False, **shared)
        self.product = product

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        """x [R, K / degree], and what else the product takes -> [R, N], or this rank's rows of it under sequence
        parallelism."""
        # As megatron's own, which hands nothing but x to the product.
        summed = reduce_from_tensor_model_parallel_region
        if self.sequence_parallel:
            summed = reduce_scatter_to_sequence_parallel_region
        return summed(self.product(x, self.weight, None, *more), group=self.tp_group) + self.bias


class _Cutter:
    """One use of `split`."""

    def __init__(self, group: dist.ProcessGroup, sequence: bool) -> None:
        self.part = TensorPart(group, sequence)
        config = ModelParallelConfig(
            tensor_model_parallel_size=group.size(),
            sequence_parallel=sequence,
            use_cpu_initialization=True,
            perform_initialization=False,
        )
        self.shared = {"config": config, "init_method": None, "tp_group": group}
        #: (the old one, which keeps its id from being given again; the new one) by id: a tied parameter is cut once.
        self.replaced: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def cut(self, model: nn.Module) -> None:
        modules = list(model.modules())
        for module in modules:
            for name, kind in getattr(module, "cuts", {}).items():
                getattr(self, f"_{kind}")(module, name)
            if hasattr(module, "part"):
                module.part = self.part
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, self._whole(parameter))

    def _column(self, module: nn.Module, name: str) -> None:
        old = getattr(module, name)
        passes = {"gather_output": False, "skip_bias_add": old.passes_bias}
        new = Column(old.in_features, old.out_features, bias=True, **passes, **self.shared)
        self._mark(new.weight, old.weight.shape, 0)
        self._mark(new.bias, old.bias.shape, 0)
        setattr(module, name, new)

    def _row(self, module: nn.Module, name: str) -> None:
        old = getattr(module, name)
        new = Row(old.in_features, old.out_features, product=old.product, **self.shared)
        self._mark(new.weight, old.weight.shape, 1)
        self._act_on_rows(new.bias)
        setattr(module, name, new)

    def _heads(self, module: nn.Module, name: str) -> None:
        layer = getattr(module, name)
        for parameter in ("weight", "bias"):
            self._narrow(layer, parameter)

    def _embedding(self, module: nn.Module, name: str) -> None:
        old = getattr(module, name)
        padded = self._share(len(old)) * self.part.degree
        scatter = self.part.sequence
        table = VocabParallelEmbedding(padded, old.shape[1], reduce_scatter_embeddings=scatter, **self.shared)
        self._mark(table.weight, old.shape, 0)
        self.replaced[id(old)] = old, table.weight
        setattr(module, name, table.weight)
        self.part.table = table

    def _vocabulary(self, module: nn.Module, name: str) -> None:
        self._narrow(module, name)

    def _narrow(self, module: nn.Module, name: str) -> None:
        old = getattr(module, name)
        if id(old) not in self.replaced:
            new = nn.Parameter(torch.empty(self._share(len(old)), *old.shape[1:]))
            self._mark(new, old.shape, 0)
            self.replaced[id(old)] = old, new
        setattr(module, name, self.replaced[id(old)][1])

    def _rows(self, module: nn.Module, name: str) -> None:
        found = getattr(module, name)
        for owner, key in [(module, name)] if isinstance(found, nn.Parameter) else [(found, "weight"), (found, "bias")]:
            setattr(owner, key, self._act_on_rows(self._whole(getattr(owner, key))))

    def _whole(self, old: nn.Parameter) -> nn.Parameter:
        """A parameter that every rank holds; one with an extent is done already."""
        if has_sharding(old):
            return old
        new = nn.Parameter(torch.empty(old.shape, device="cpu")) if old.is_meta else old
        set_sharding(new, new.shape, None, saved=self.part.rank == 0)
        return new

    def _act_on_rows(self, parameter: nn.Parameter) -> nn.Parameter:
        """Sum the gradient of `parameter` over the ranks where each has its own rows."""
        if self.part.sequence:
            parameter.sequence_parallel = True  # megatron's name
            parameter.register_hook(functools.partial(_summed_gradient, group=self.part.group))
        return parameter

    def _mark(self, parameter: nn.Parameter, full: torch.Size, dim: int) -> None:
        """`parameter` is this rank's part along `dim` of one of shape `full`."""
        if not getattr(parameter, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)
        start, stop = (min(full[dim], (self.part.rank + end) * parameter.shape[dim]) for end in (0, 1))
        set_sharding(parameter, full, Slice(dim, start, stop), saved=True)

    def _share(self, size: int) -> int:
        """Rows of each rank, the last ones filled up."""
        return -(-size // self.part.degree)


class _Entering(Function):
    """The identity; backward the sum over the ranks. (megatron's own loses it where the gradient is not contiguous.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad.clone(memory_format=torch.contiguous_format), ctx.group), None


class _LogSum(Function):
    """log of the sum of exp(x) over the ranks. Every rank goes on alike with the result: backward nothing is sent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        top = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        never = top == float("-inf")
        share = (x - top.masked_fill(never, 0.0)).exp_()
        total = _summed(share.clone(memory_format=torch.contiguous_format), group)
        ctx.save_for_backward(share.div_(total).masked_fill_(never, 0.0))
        return top.add_(total.log_())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (share,) = ctx.saved_tensors
        return torch.where(share == 0, 0.0, grad * share), None


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`x`, contiguous, overwritten with its sum over the ranks."""
    dist.all_reduce(x, group=group)
    return x


def _summed_gradient(grad: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks in fp32: as exact as the sum over rows that it continues."""
    wide = grad.float() if grad.dtype in (torch.bfloat16, torch.float16) else grad.clone()
    return _summed(wide.contiguous(), group).to(grad.dtype)


def _prepare(group: dist.ProcessGroup) -> None:
    """What megatron's layers expect to find: a buffer for gathered rows and, on a CPU, a current device."""
    # Names that newer versions of torch have changed.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*")
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    if dist.get_backend(group) == "gloo":
        for module in (layers, mappings, megatron.core.utils):
            module.torch = _TorchOnCpu()
        # Advice about CUDA streams.
        layers.linear_with_grad_accumulation_and_async_allreduce.warned = True


class _TorchOnCpu(types.ModuleType):
    """torch as megatron's modules see it on a CPU: they ask for the current CUDA device and nothing else of CUDA."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = types.SimpleNamespace(current_device=lambda: torch.device("cpu"))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
