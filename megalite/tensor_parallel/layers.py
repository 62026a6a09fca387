"""Linear layers and the embedding, divided over the ranks of the tensor axis (Megatron-LM, arXiv:1909.08053).

Every layer takes its group in the constructor and declares in `shard_specs` which slice of which global tensor each
of its parameters holds. Weights have torch's shape, ``[out_features, in_features]``, and are left uninitialised:
`megalite.tensor_parallel.init` fills them by name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.parallel.sharding import ShardSpec, padded_vocabulary
from megalite.parallel.tensor_group import TensorGroup
from megalite.tensor_parallel.collectives import copy_to_group, enter_region, gather_from_group, leave_region
from megalite.tensor_parallel.linear import ONE_RANK, linear
from megalite.tensor_parallel.weight_grad_store import WeightGradients


class ShardedModule(nn.Module):
    """A module that declares the shards of its own parameters.

    `shard_specs` maps a parameter of this module to its shards, with names relative to the module, or to the
    module's parent where the parameter is fused from several named tensors.
    """

    shard_specs: dict[str, tuple[ShardSpec, ...]]
    fused: bool = False
    weight_gradients: WeightGradients | None = None
    """When a linear layer computes its weight's gradient; None: always in the backward."""


class ColumnParallelLinear(ShardedModule):
    """``y = x W^T + b`` with the rows of W, and so the features of y, divided over the group.

    Takes x ``[..., in_features]``, the same on every rank, and returns ``[..., out_features / size]``, or all of
    ``[..., out_features]`` with `gather_output`. Where the group divides tokens, x is this rank's share of them, but
    for an x that has `entered` the sharded region already (`enter_region`); y has all tokens.

    `parts` names what is fused: ``{"query": 512, "key": 128, "value": 128}`` computes three projections as one
    product. Each part is divided over the ranks by itself, and the local output holds the local parts in order.
    Raises ValueError where the group's size does not divide a part.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group: TensorGroup,
        bias: bool,
        gather_output: bool = False,
        parts: Mapping[str, int] | None = None,
        padded_size: int | None = None,
    ) -> None:
        super().__init__()
        self.group, self.gather_output, self.fused = group, gather_output, parts is not None
        sizes = {f"{name}.": size for name, size in parts.items()} if parts else {"": out_features}
        if sum(sizes.values()) != out_features:
            raise ValueError(f"the parts {dict(parts or {})} do not add up to out_features={out_features}")
        weights = tuple(ShardSpec(f"{part}weight", (n, in_features), 0, padded_size) for part, n in sizes.items())
        self.shard_specs = {"weight": weights}
        rows = [spec.share(group.size) for spec in weights]
        self.local_sizes = tuple(rows)
        self.weight = nn.Parameter(torch.empty(sum(rows), in_features))
        if bias:
            self.bias = nn.Parameter(torch.empty(sum(rows)))
            self.shard_specs["bias"] = tuple(ShardSpec(f"{part}bias", (n,), 0) for part, n in sizes.items())
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor, *, entered: bool = False) -> Tensor:
        entering = ONE_RANK if entered else self.group
        y = linear(
            *(x, self.weight, self.bias),
            kernels=self.group.kernels,
            entering=entering,
            weight_gradients=self.weight_gradients,
        )
        return gather_from_group(y, self.group) if self.gather_output else y


class RowParallelLinear(ShardedModule):
    """``y = x W^T + b`` with the columns of W, and so the features of x, divided over the group.

    Takes x ``[..., in_features / size]``, as a `ColumnParallelLinear` leaves it, and returns y
    ``[..., out_features]``, the same on every rank, or where the group divides tokens this rank's share of them. The
    bias is whole on every rank and added once.
    """

    def __init__(self, in_features: int, out_features: int, *, group: TensorGroup, bias: bool) -> None:
        super().__init__()
        self.group = group
        spec = ShardSpec("weight", (out_features, in_features), 1)
        self.shard_specs = {"weight": (spec,)}
        self.weight = nn.Parameter(torch.empty(spec.local_shape(group.size)))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        kernels, weight_gradients = self.group.kernels, self.weight_gradients
        y = leave_region(linear(x, self.weight, kernels=kernels, weight_gradients=weight_gradients), self.group)
        return y if self.bias is None else y + self.bias


class HeadSliceLinear(ShardedModule):
    """A projection whose weight is whole on every rank, of which each rank computes only some output rows.

    For key and value projections with fewer heads than ranks: several ranks need the same head. The weight's
    gradient is summed over the group, so that every rank holds the whole of it and the copies never part.

    Takes x ``[..., in_features]`` as `ColumnParallelLinear` does; returns ``[..., rows]`` for the part's slices of
    `rows`.
    """

    def __init__(
        self, in_features: int, parts: Mapping[str, int], rows: slice, *, group: TensorGroup, bias: bool
    ) -> None:
        super().__init__()
        self.group, self.fused = group, True
        starts = [sum(list(parts.values())[:index]) for index in range(len(parts))]
        self.rows = [slice(start + rows.start, start + rows.stop) for start in starts]
        self.shard_specs = {
            "weight": tuple(ShardSpec(f"{part}.weight", (n, in_features), None) for part, n in parts.items())
        }
        self.weight = nn.Parameter(torch.empty(sum(parts.values()), in_features))
        if bias:
            self.bias = nn.Parameter(torch.empty(sum(parts.values())))
            self.shard_specs["bias"] = tuple(ShardSpec(f"{part}.bias", (n,), None) for part, n in parts.items())
        else:
            self.register_parameter("bias", None)

    def _own_rows(self, parameter: Tensor) -> Tensor:
        whole = copy_to_group(parameter, self.group)
        return torch.cat([whole[rows] for rows in self.rows])

    def forward(self, x: Tensor, *, entered: bool = False) -> Tensor:
        bias = None if self.bias is None else self._own_rows(self.bias)
        x = x if entered else enter_region(x, self.group)
        return self.group.kernels.linear(x, self._own_rows(self.weight), bias)


class VocabParallelEmbedding(ShardedModule):
    """A table of embeddings with its rows, the vocabulary, divided over the group.

    Takes token ids ``[...]``, the same on every rank, and returns ``[..., hidden]``, likewise, or where the group
    divides tokens this rank's share of them ``[1, tokens / size, hidden]``. The table is padded
    so that every rank holds as many rows; the padding is zero, is never looked up, and is in no checkpoint.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, group: TensorGroup) -> None:
        super().__init__()
        self.group = group
        spec = ShardSpec("weight", (vocab_size, hidden_size), 0, padded_vocabulary(vocab_size, group.size))
        self.shard_specs = {"weight": (spec,)}
        self.first_id = group.rank * spec.share(group.size)
        self.weight = nn.Parameter(torch.empty(spec.local_shape(group.size)))

    def forward(self, ids: Tensor) -> Tensor:
        if self.group.size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.first_id
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return leave_region(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.group)


def parameter_shards(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, tuple[ShardSpec, ...]]]:
    """Yield (name in the module, parameter, its shards with global names), each parameter once.

    A parameter that no layer declares is whole on every rank, under its own name. Global names follow the module
    tree; the shards of a fused layer stand beside the layer: ``attention.qkv.weight`` holds
    ``attention.query.weight``, ``attention.key.weight`` and ``attention.value.weight``.
    """
    seen: set[int] = set()
    for path, owner in module.named_modules():
        declared = owner.shard_specs if isinstance(owner, ShardedModule) else {}
        prefix = path
        if isinstance(owner, ShardedModule) and owner.fused:
            prefix = path.rpartition(".")[0]
        for local, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            shards = declared.get(local)
            if shards is None:
                specs = (ShardSpec(_join(path, local), tuple(parameter.shape), None),)
            else:
                specs = tuple(replace(spec, name=_join(prefix, spec.name)) for spec in shards)
            yield _join(path, local), parameter, specs


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
