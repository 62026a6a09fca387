"""Column- and row-parallel linear layers and the vocabulary-parallel embedding (Megatron-LM, arXiv:1909.08053).

Every layer takes its group in the constructor and declares in `shard_specs` which region of which global tensor
each of its parameters holds. Weights have torch's shape, ``[out_features, in_features]``, and are left uninitialised:
`megalite.tensor_parallel.init` initialises them by name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.parallel.sharding import LocalShard, Position, ShardSpec, local_shards, padded_vocabulary
from megalite.parallel.tensor_group import TensorGroup
from megalite.tensor_parallel.collectives import copy_to_group, enter_parallel_region, leave_parallel_region
from megalite.tensor_parallel.linear import ONE_RANK, linear
from megalite.tensor_parallel.weight_grad_store import WeightGradDeferral

_ROWS, _COLUMNS = {"tensor": 0}, {"tensor": 1}
"""The dim of a weight ``[out_features, in_features]`` along which the tensor axis divides it."""


class ShardedModule(nn.Module):
    """A module that declares the shards of its parameters; its `group` says which of them this rank holds.

    `shard_specs` maps a parameter of this module to its shards, with names relative to the module, or to the
    module's parent where the parameter is fused from several named tensors.
    """

    group: TensorGroup
    shard_specs: dict[str, tuple[ShardSpec, ...]]
    fused: bool = False
    ends_branch: bool = False
    """Whether the output is added to the residual stream: the weights are initialised smaller the deeper the model."""
    weight_grad_deferral: WeightGradDeferral | None = None
    """Where a linear layer defers its weight gradient to; None: it computes the gradient in the backward."""

    @property
    def position(self) -> Position:
        """This rank's place along the axes that divide the module's parameters."""
        return self.group.position


class LinearModule(ShardedModule):
    """A module that multiplies every token by its weight."""

    def flops_per_token(self, sequence_length: int) -> float:
        """Return the FLOPs of one token's forward and backward over all ranks: 6 for each element of the weight."""
        return 6.0 * sum(prod(spec.global_shape) for spec in self.shard_specs["weight"])


class ColumnParallelLinear(LinearModule):
    """``y = x W^T + b`` with the rows of W, and so the features of y, divided over the group.

    Takes x ``[..., in_features]``, the same on every rank, and returns ``[..., out_features / size]``. With sequence
    parallelism x is this rank's share of the tokens, unless it is `gathered` already (`enter_parallel_region`); y has
    all tokens.

    `parts` names projections that are fused into one product: ``{"query": 512, "key": 128, "value": 128}``. Each part
    is divided over the ranks separately, and the local output holds the local parts in order. Raises ValueError where
    the group's size does not divide a part.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group: TensorGroup,
        bias: bool,
        parts: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.group, self.fused = group, parts is not None
        sizes = {f"{name}.": size for name, size in parts.items()} if parts else {"": out_features}
        if sum(sizes.values()) != out_features:
            raise ValueError(f"the parts {dict(parts or {})} do not add up to out_features={out_features}")
        weights = tuple(ShardSpec(f"{part}weight", (n, in_features), _ROWS) for part, n in sizes.items())
        self.shard_specs = {"weight": weights}
        rows = [spec.local_shape(group.position)[0] for spec in weights]
        self.local_sizes = tuple(rows)
        self.weight = nn.Parameter(torch.empty(sum(rows), in_features))
        if bias:
            self.bias = nn.Parameter(torch.empty(sum(rows)))
            self.shard_specs["bias"] = tuple(ShardSpec(f"{part}bias", (n,), _ROWS) for part, n in sizes.items())
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor, *, gathered: bool = False) -> Tensor:
        return linear(
            *(x, self.weight, self.bias),
            kernels=self.group.kernels,
            input_group=ONE_RANK if gathered else self.group,
            weight_grad_deferral=self.weight_grad_deferral,
        )


class RowParallelLinear(LinearModule):
    """``y = x W^T + b`` with the columns of W, and so the features of x, divided over the group.

    Takes x ``[..., in_features / size]``, as `ColumnParallelLinear` returns it, and returns y ``[..., out_features]``,
    the same on every rank, or with sequence parallelism this rank's share of the tokens. The bias is replicated on
    every rank and added once.
    """

    ends_branch = True

    def __init__(self, in_features: int, out_features: int, *, group: TensorGroup, bias: bool) -> None:
        super().__init__()
        self.group = group
        spec = ShardSpec("weight", (out_features, in_features), _COLUMNS)
        self.shard_specs = {"weight": (spec,)}
        self.weight = nn.Parameter(torch.empty(spec.local_shape(group.position)))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        kernels, weight_grad_deferral = self.group.kernels, self.weight_grad_deferral
        y = leave_parallel_region(
            linear(x, self.weight, kernels=kernels, weight_grad_deferral=weight_grad_deferral), self.group
        )
        return y if self.bias is None else y + self.bias


class ReplicatedKVLinear(LinearModule):
    """Key and value projections with a replicated weight, of which each rank computes only some output rows.

    For models with fewer key-value heads than tensor ranks, where several ranks need the same head. The weight's
    gradient is all-reduced over the group, so that the replicas stay equal.

    Takes x ``[..., in_features]`` as `ColumnParallelLinear` does, and returns ``[..., len(parts) * len(rows)]``: the
    slice `rows` of every part.
    """

    def __init__(
        self, in_features: int, parts: Mapping[str, int], rows: slice, *, group: TensorGroup, bias: bool
    ) -> None:
        super().__init__()
        self.group, self.fused = group, True
        starts = [sum(list(parts.values())[:index]) for index in range(len(parts))]
        self.rows = [slice(start + rows.start, start + rows.stop) for start in starts]
        self.shard_specs = {"weight": tuple(ShardSpec(f"{part}.weight", (n, in_features)) for part, n in parts.items())}
        self.weight = nn.Parameter(torch.empty(sum(parts.values()), in_features))
        if bias:
            self.bias = nn.Parameter(torch.empty(sum(parts.values())))
            self.shard_specs["bias"] = tuple(ShardSpec(f"{part}.bias", (n,)) for part, n in parts.items())
        else:
            self.register_parameter("bias", None)

    def _local_rows(self, parameter: Tensor) -> Tensor:
        replicated = copy_to_group(parameter, self.group)
        return torch.cat([replicated[rows] for rows in self.rows])

    def forward(self, x: Tensor, *, gathered: bool = False) -> Tensor:
        bias = None if self.bias is None else self._local_rows(self.bias)
        x = x if gathered else enter_parallel_region(x, self.group)
        return self.group.kernels.linear(x, self._local_rows(self.weight), bias)


class VocabParallelEmbedding(ShardedModule):
    """An embedding table whose rows, the vocabulary, are divided over the group.

    Takes token ids ``[...]``, the same on every rank, and returns ``[..., hidden]``, the same on every rank, or with
    sequence parallelism this rank's share of the tokens, ``[1, tokens / size, hidden]``. The table is padded so that
    every rank holds an equal number of rows. The padding is zero, is never looked up, and is not in checkpoints.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, group: TensorGroup) -> None:
        super().__init__()
        self.group = group
        padded = padded_vocabulary(vocab_size, group.size)
        spec = ShardSpec("weight", (vocab_size, hidden_size), _ROWS, padded)
        self.shard_specs = {"weight": (spec,)}
        self.first_id = group.rank * padded // group.size
        self.weight = nn.Parameter(torch.empty(spec.local_shape(group.position)))

    def forward(self, ids: Tensor) -> Tensor:
        if self.group.size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.first_id
        on_other_rank = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(on_other_rank, 0), self.weight)
        return leave_parallel_region(rows.masked_fill(on_other_rank.unsqueeze(-1), 0.0), self.group)


@dataclass(frozen=True, slots=True)
class PlacedParameter:
    """A parameter, its name in its module, the shards of global tensors that it is made of, and its shape with padding.

    ZeRO-3 takes the shape away from the parameter itself.
    """

    name: str
    parameter: nn.Parameter
    shards: tuple[LocalShard, ...]
    shape: tuple[int, ...]
    ends_branch: bool = False


def placed_parameters(module: nn.Module) -> Iterator[PlacedParameter]:
    """Yield each parameter of a module once, with its shards on this rank under their global names.

    A parameter that no layer declares is replicated on every rank, and its global name is its name in the module.
    Global names follow the module tree. The shards of a fused layer are named beside the layer:
    ``attention.qkv.weight`` holds ``attention.query.weight``, ``attention.key.weight`` and ``attention.value.weight``.
    """
    seen: set[int] = set()
    for path, owner in module.named_modules():
        declared, position, prefix = {}, {}, path
        if isinstance(owner, ShardedModule):
            declared, position = owner.shard_specs, owner.position
            prefix = path.rpartition(".")[0] if owner.fused else path
        for local, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            shape = tuple(parameter.shape)
            specs = [replace(spec, name=_join(prefix, spec.name)) for spec in declared.get(local, ())]
            specs = specs or [ShardSpec(_join(path, local), shape)]
            shards, ends_branch = tuple(local_shards(specs, position)), getattr(owner, "ends_branch", False)
            yield PlacedParameter(_join(path, local), parameter, shards, shape, ends_branch)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
