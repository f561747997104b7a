"""Tensor and sequence parallelism on megatron-core: the only module that imports it, used if the degree is above 1.

`apply_tensor_parallel` shards a model that was built whole: linear layers become megatron's column- and row-parallel
ones, the token matrix its vocabulary-parallel embedding, and each layer gets its region (`parallel/region.py`).
Communication volume: docs/parallelism.md.
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
from exlm_dist.parallel.region import TensorRegion
from exlm_dist.parallel.sharded import has_sharding, set_sharding

with warnings.catch_warnings(), decorators_without_compiler():
    warnings.simplefilter("ignore")  # about optional packages
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


def apply_tensor_parallel(model: nn.Module, group: dist.ProcessGroup, *, sequence: bool = False) -> None:
    """Reduce `model`, or some layers of one, in place to the shard of this rank of the tensor-parallel `group`.

    New parameters are on the CPU, in fp32 and uninitialised; so are replicated ones that were on the meta device. Each
    carries its sharding (read by `sharded_parameters`), and a sharded one megatron's `tensor_model_parallel` as well:
    gradient norms count the others once. `sequence`: between the linear layers each rank has a slice of the rows.
    """
    _prepare(group)
    _Sharder(group, sequence).shard(model)


class ShardedRegion(TensorRegion):
    """The region of one rank of a tensor-parallel group."""

    is_sharded = True

    def __init__(self, group: dist.ProcessGroup, sequence: bool) -> None:
        self.group, self.sequence = group, sequence
        self.rank, self.degree = group.rank(), group.size()
        self.row_multiple = self.degree if sequence else 1
        self.table: VocabParallelEmbedding | None = None  # where this rank has the embedding

    def first_index(self, local: int) -> int:
        """See `TensorRegion`."""
        return self.rank * local

    def first_row(self, local: int) -> int:
        """See `TensorRegion`."""
        return self.rank * local if self.sequence else 0

    def gather_from(self, hidden: Tensor) -> Tensor:
        """See `TensorRegion`."""
        if not self.sequence:
            return hidden
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=self.group)

    def take_rows(self, hidden: Tensor, index: Tensor) -> Tensor:
        """See `TensorRegion`."""
        if not self.sequence:
            return super().take_rows(hidden, index)
        every = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.group)
        return super().take_rows(every, index.chunk(self.degree)[self.rank])

    def copy_to(self, x: Tensor) -> Tensor:
        """See `TensorRegion`."""
        return _CopyTo.apply(x, self.group)

    def embed(self, ids: Tensor, weight: Tensor) -> Tensor:
        """See `TensorRegion`; `weight` is that of the table."""
        assert self.table is not None
        hidden = self.table(ids[None])  # [1, R, D]; [R / degree, 1, D] under sequence parallelism
        return hidden.squeeze(1 if self.sequence else 0)

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `TensorRegion`."""
        return _all_reduce(x, self.group)

    def logsumexp(self, x: Tensor) -> Tensor:
        """See `TensorRegion`."""
        return _LogSumExp.apply(x, self.group)

    def argmax(self, values: Tensor, ids: Tensor) -> Tensor:
        """See `TensorRegion`; of equal values the one of the first rank."""
        largest = values.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        ids = ids.masked_fill(values < largest, torch.iinfo(ids.dtype).max)
        dist.all_reduce(ids, dist.ReduceOp.MIN, group=self.group)
        return ids


class ColumnLinear(ColumnParallelLinear):
    """Column-parallel linear layer; one that passes its bias on (kernels/linear) passes on this rank's part."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """x [R, K], or this rank's rows of it under sequence parallelism -> [R, N / degree]; and a bias to pass on."""
        out, bias = super().forward(x)
        return out if bias is None else (out + bias.detach(), bias.view_as(bias))


class RowLinear(RowParallelLinear):
    """Row-parallel linear layer. `product` (x, weight, bias, more) is the unsharded layer's own."""

    def __init__(self, inputs: int, outputs: int, *, product: Callable[..., Tensor], **shared: Any) -> None:
        super().__init__(inputs, outputs, bias=True, input_is_parallel=True, skip_bias_add=False, **shared)
        self.product = product

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        """x [R, K / degree], and what else the product takes -> [R, N], or this rank's rows of it under sequence
        parallelism."""
        # As megatron's own, which passes only x to the product.
        reduce = reduce_from_tensor_model_parallel_region
        if self.sequence_parallel:
            reduce = reduce_scatter_to_sequence_parallel_region
        return reduce(self.product(x, self.weight, None, *more), group=self.tp_group) + self.bias


class _Sharder:
    """One call of `apply_tensor_parallel`."""

    def __init__(self, group: dist.ProcessGroup, sequence: bool) -> None:
        self.region = ShardedRegion(group, sequence)
        config = ModelParallelConfig(
            tensor_model_parallel_size=group.size(),
            sequence_parallel=sequence,
            use_cpu_initialization=True,
            perform_initialization=False,
        )
        self.shared = {"config": config, "init_method": None, "tp_group": group}
        #: (the old one, kept so that its id is not reused; the new one) by id: a tied parameter is sharded once.
        self.replaced: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def shard(self, model: nn.Module) -> None:
        modules: list[Any] = list(model.modules())
        for module in modules:
            for name, kind in getattr(module, "tensor_sharding", {}).items():
                getattr(self, f"_shard_{kind}")(module, name)
            if hasattr(module, "region"):
                module.region = self.region
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, self._replicated(parameter))

    def _shard_column(self, module: nn.Module, name: str) -> None:
        old = getattr(module, name)
        passes = {"gather_output": False, "skip_bias_add": old.passes_bias}
        new = ColumnLinear(old.in_features, old.out_features, bias=True, **passes, **self.shared)
        self._mark(new.weight, old.weight.shape, 0)
        self._mark(new.bias, old.bias.shape, 0)
        setattr(module, name, new)

    def _shard_row(self, module: nn.Module, name: str) -> None:
        old = getattr(module, name)
        new = RowLinear(old.in_features, old.out_features, product=old.product, **self.shared)
        self._mark(new.weight, old.weight.shape, 1)
        self._on_local_tokens(new.bias)
        setattr(module, name, new)

    def _shard_head(self, module: nn.Module, name: str) -> None:
        layer = getattr(module, name)
        for parameter in ("weight", "bias"):
            self._narrow(layer, parameter)

    def _shard_embedding(self, module: nn.Module, name: str) -> None:
        old = getattr(module, name)
        padded = self._padded_rows(len(old)) * self.region.degree
        scatter = self.region.sequence
        table = VocabParallelEmbedding(padded, old.shape[1], reduce_scatter_embeddings=scatter, **self.shared)
        self._mark(table.weight, old.shape, 0)
        self.replaced[id(old)] = old, table.weight
        setattr(module, name, table.weight)
        self.region.table = table

    def _shard_vocab(self, module: nn.Module, name: str) -> None:
        self._narrow(module, name)

    def _narrow(self, module: nn.Module, name: str) -> None:
        old = getattr(module, name)
        if id(old) not in self.replaced:
            new = nn.Parameter(torch.empty(self._padded_rows(len(old)), *old.shape[1:]))
            self._mark(new, old.shape, 0)
            self.replaced[id(old)] = old, new
        setattr(module, name, self.replaced[id(old)][1])

    def _shard_token(self, module: nn.Module, name: str) -> None:
        found = getattr(module, name)
        for owner, key in [(module, name)] if isinstance(found, nn.Parameter) else [(found, "weight"), (found, "bias")]:
            setattr(owner, key, self._on_local_tokens(self._replicated(getattr(owner, key))))

    def _replicated(self, old: nn.Parameter) -> nn.Parameter:
        """A parameter that every rank has in full; one with a sharding is done already."""
        if has_sharding(old):
            return old
        new = nn.Parameter(torch.empty(old.shape, device="cpu")) if old.is_meta else old
        set_sharding(new, new.shape, None, saved=self.region.rank == 0)
        return new

    def _on_local_tokens(self, parameter: nn.Parameter) -> nn.Parameter:
        """Sum the gradient of `parameter` over the ranks where each has its own tokens."""
        if self.region.sequence:
            setattr(parameter, "sequence_parallel", True)  # noqa: B010  # megatron's name
            parameter.register_hook(functools.partial(_reduced_gradient, group=self.region.group))
        return parameter

    def _mark(self, parameter: nn.Parameter, full: torch.Size, dim: int) -> None:
        """`parameter` is this rank's part along `dim` of one of shape `full`."""
        if not getattr(parameter, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)
        start, stop = (min(full[dim], (self.region.rank + end) * parameter.shape[dim]) for end in (0, 1))
        set_sharding(parameter, full, Slice(dim, start, stop), saved=True)

    def _padded_rows(self, size: int) -> int:
        """Rows on each rank, the last ones padding."""
        return -(-size // self.region.degree)


class _CopyTo(Function):
    """The identity; backward the sum over the ranks. (megatron's own loses it if the gradient is not contiguous.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad.clone(memory_format=torch.contiguous_format), ctx.group), None


class _LogSumExp(Function):
    """log of the sum of exp(x) over the ranks. Every rank computes the same from the result: backward sends nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        top = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        never = top == float("-inf")
        exp = (x - top.masked_fill(never, 0.0)).exp_()
        total = _all_reduce(exp.clone(memory_format=torch.contiguous_format), group)
        ctx.save_for_backward(exp.div_(total).masked_fill_(never, 0.0))
        return top.add_(total.log_())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (softmax,) = ctx.saved_tensors
        return torch.where(softmax == 0, 0.0, grad * softmax), None


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`x`, contiguous, overwritten with its sum over the ranks."""
    dist.all_reduce(x, group=group)
    return x


def _reduced_gradient(grad: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks in fp32: as precise as the sum over rows that it completes."""
    wide = grad.float() if grad.dtype in (torch.bfloat16, torch.float16) else grad.clone()
    return _all_reduce(wide.contiguous(), group).to(grad.dtype)


def _prepare(group: dist.ProcessGroup) -> None:
    """Set up what megatron's layers expect: a buffer for gathered rows and, on a CPU, a current device."""
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
