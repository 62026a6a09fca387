"""A pipeline stage of the model: its blocks, the embedding on the first stage, norm and head on the last.

The whole model is a stage that is both first and last. There is no second class for training without a pipeline.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from megalite.model.activation_checkpointing import run_layers
from megalite.model.compilation import compile_layer, declare_dynamic
from megalite.model.config import ModelConfig
from megalite.model.dropout import DropoutStreams
from megalite.model.embedding import Head
from megalite.model.kv_cache import KVCache
from megalite.model.loss import LossFunction, cross_entropy
from megalite.model.microbatch import Microbatch
from megalite.model.packing import PackedDocuments
from megalite.model.recompute import Recompute
from megalite.model.registry import family_of
from megalite.model.transformer import Attention
from megalite.parallel.tensor_group import TensorGroup
from megalite.pipeline.stage_io import Edge, StageOutput, TensorSpec, add_losses
from megalite.tensor_parallel.cross_entropy import VocabParallelLogits
from megalite.tensor_parallel.init import initialise_parameter
from megalite.tensor_parallel.layers import PlacedParameter, ShardedModule, placed_parameters
from megalite.tensor_parallel.weight_grad_store import WeightGradDeferral

TOKEN_TABLE = "embedding.tokens.weight"
HIDDEN = "hidden"
"""The name of the activation between stages: the residual stream."""


def run_block(
    block: nn.Module, x: Tensor, *, packing: PackedDocuments | None, dropout: DropoutStreams | None
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Run a training forward of one layer; with `Stage`'s `compiled` this function is compiled."""
    return block(x, packing=packing, dropout=dropout)


class Stage(nn.Module):
    """Stage `index` of `num_stages`: the blocks of `layers`, and the embedding (first stage) or the head (last stage).

    ``forward(inputs, microbatch=...)`` takes the activations of the previous stage, none on the first stage, and
    returns the hidden states ``[B, S, H]`` as the activation `HIDDEN`; on the last stage it returns the losses that
    `loss` computes from the logits instead. Every stage also returns the losses of its layers, if they have any.
    `recompute` says which activations the backward recomputes. With `compiled` torch.compile compiles the layers for
    training; `next_logits` runs them as they are.

    Where one rank holds the first stage and the last, `table` is the `tied_table` of the first stage, which the last
    stage shares; it remains a parameter of the first stage.

    With sequence parallelism a stage takes and returns ``[1, B*S / size, H]``, this rank's share of the tokens in their
    order, and `rows` is B; raises ValueError where `rows` is missing.

    A backward inside ``weight_grad_deferral.enabled()`` defers the weight gradients of the linear layers.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: Sequence[int],
        *,
        index: int,
        num_stages: int,
        group: TensorGroup,
        table: nn.Parameter | None = None,
        rows: int | None = None,
        recompute: Recompute | None = None,
        loss: LossFunction = cross_entropy,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        if group.sequence_parallel and rows is None:
            raise ValueError("with sequence parallelism a stage needs `rows`, the number of rows of a microbatch")
        rows = rows if group.sequence_parallel else None
        self.index, self.num_stages, self.group = index, num_stages, group
        self.recompute, self.loss, self._rows, self._compiled = recompute, loss, rows, compiled
        self._run_block = compile_layer(run_block) if compiled else run_block
        first, last = index == 0, index == num_stages - 1
        builder = family_of(config).build(config, group, rows)
        self.embedding = builder.embedding() if first else None
        self.layers = nn.ModuleDict({str(layer): builder.block(layer) for layer in layers})
        self.final_norm = builder.norm() if last else None
        self.tied = config.tie_word_embeddings
        shared = table if self.tied_table is None else self.tied_table
        self.head = Head(config, group, tied=shared) if last else None
        self._hidden_size = config.hidden_size
        rotaries = {module.rotary for module in self.modules() if isinstance(module, Attention)}
        self._rotaries = [rotary for rotary in rotaries if rotary is not None]
        self.weight_grad_deferral = WeightGradDeferral()
        for module in self.modules():
            if isinstance(module, ShardedModule):
                module.weight_grad_deferral = self.weight_grad_deferral
            if isinstance(module, Attention):
                module.recompute_core = recompute is not None and recompute.mode == "selective"
        self._std = config.initializer_range
        # The sum of 2 * layers residual branches then has the variance of one branch (GPT-2).
        self._residual_std = config.initializer_range / (2 * config.num_hidden_layers) ** 0.5
        # Placed here, while parameters have their shapes: ZeRO-3 partitions them later.
        self.placed_parameters = tuple(
            self._under_shared_name(placed) for placed in placed_parameters(self) if placed.parameter is not table
        )
        """The parameters of this stage, with their shards under global names."""
        self.sequence_parallel_names = self._sequence_parallel_names()
        """The names, in this module, of `sequence_parallel_parameters`."""
        self.compute_dtype: torch.dtype | None = None
        """Dtype of the weights in forward and backward, where an engine keeps the parameters in another; else None."""

    def forward(self, inputs: Mapping[str, Tensor], *, microbatch: Microbatch) -> StageOutput:
        packing, dropout = microbatch.packing, microbatch.dropout
        if dropout is not None and self.group.sequence_parallel:
            dropout = replace(dropout, token_share=(self.group.rank, self.group.size))
        if self.embedding is not None:
            assert microbatch.ids is not None
            x = self.embedding(microbatch.ids, packing.positions_BS if packing else None)
            x = dropout.for_layer(None).hidden(x, "embedding") if dropout else x
        else:
            x = inputs[HIDDEN]
        if self._compiled:
            declare_dynamic(packing)
            for rotary in self._rotaries:
                rotary.tables(x)  # cached before a compiled layer looks for them
        layers = {
            int(number): partial(
                self._run_block, block, packing=packing, dropout=dropout and dropout.for_layer(int(number))
            )
            for number, block in self.layers.items()
        }
        x, losses = run_layers(layers, x, self.recompute, self.group)
        losses = {name: loss.float() / microbatch.num_microbatches for name, loss in losses.items()}
        if self.head is None:
            return StageOutput({HIDDEN: x}, losses)
        return StageOutput({}, add_losses(losses, self.loss(self.logits(x), microbatch)))

    def logits(self, x: Tensor) -> VocabParallelLogits:
        """Return the logits of the last layer's hidden states ``[..., H]``. Only for the last stage.

        Of a rank's share of the tokens ``[1, B*S / size, H]``, return the logits of all tokens ``[B, S, V]``.
        """
        assert self.head is not None
        assert self.final_norm is not None
        local = self.head(self.final_norm(x))
        if self._rows is not None:
            local = local.view(self._rows, -1, local.shape[-1])
        return VocabParallelLogits(local, self.head.first_id, self.head.vocab_size, self.group)

    def next_logits(self, ids_BS: Tensor, cache: KVCache) -> Tensor:
        """Append tokens ``[B, S]`` to the KV cache; return the logits ``[B, V]`` of each row's next token, fp32.

        Only for the stage that is the whole model.
        """
        assert self.embedding is not None
        assert not self.group.sequence_parallel
        x_BSH = self.embedding(ids_BS, cache.positions_BS)
        for block, layer in zip(self.layers.values(), cache.layers, strict=True):
            x_BSH = block(x_BSH, cache=layer)
        last_BH = cache.last_tokens(x_BSH)
        cache.advance()
        return self.logits(last_BH).gather()

    @property
    def activation_dtype(self) -> torch.dtype:
        """Dtype of the weights in forward and backward, and of the activations that the stage returns."""
        return self.compute_dtype or next(self.parameters()).dtype

    def edge(self, rows: int, sequence_length: int) -> Edge:
        """Return the activations that this stage sends for a microbatch ``[B, S]``; none on the last stage."""
        if self.head is not None:
            return {}
        if self.group.sequence_parallel:
            rows, sequence_length = 1, rows * sequence_length // self.group.size
        return {HIDDEN: TensorSpec((rows, sequence_length, self._hidden_size), self.activation_dtype)}

    def sequence_parallel_parameters(self) -> list[nn.Parameter]:
        """Replicated parameters whose gradient comes from this rank's tokens alone, because of sequence parallelism.

        These are norms, biases of row-parallel layers and learned positions, which apply to the residual stream. Their
        gradients are all-reduced over the group once per step. Empty without sequence parallelism.
        """
        return [self.get_parameter(name) for name in sorted(self.sequence_parallel_names)]

    def _sequence_parallel_names(self) -> frozenset[str]:
        if not self.group.sequence_parallel:
            return frozenset()
        layers = [module for module in self.modules() if isinstance(module, ShardedModule)]
        declared = {id(getattr(layer, name)) for layer in layers for name in layer.shard_specs}
        return frozenset(placed.name for placed in self.placed_parameters if id(placed.parameter) not in declared)

    @property
    def tied_table(self) -> nn.Parameter | None:
        """The embedding's token table if the head shares it; None on stages without the embedding."""
        return self.embedding.tokens.weight if self.embedding is not None and self.tied else None

    @property
    def tied_copy(self) -> nn.Parameter | None:
        """This stage's copy of a tied token table that another stage holds too; else None."""
        return None if self.tied_copy_name is None else self.get_parameter(self.tied_copy_name)

    @property
    def tied_copy_name(self) -> str | None:
        """The name of `tied_copy` in this module; None where this stage has none."""
        if not self.tied or self.num_stages == 1:
            return None
        return "head.weight" if self.head is not None else TOKEN_TABLE if self.embedding is not None else None

    def _under_shared_name(self, placed: PlacedParameter) -> PlacedParameter:
        """Return a parameter under its global name, which for a tied head is that of the embedding's table."""
        if not self.tied or placed.name != "head.weight":
            return placed
        (shard,) = placed.shards
        return replace(placed, shards=(replace(shard, spec=replace(shard.spec, name=TOKEN_TABLE)),))

    def initialise(self, seed: int) -> None:
        """Initialise every parameter from the seed and its global name: the same weights under every layout."""
        for placed in self.placed_parameters:
            initialise_parameter(placed.parameter, placed.shards, seed=seed, std=self.initial_std(placed))

    def initial_std(self, placed: PlacedParameter) -> float:
        """Return the standard deviation of a matrix's initial weights."""
        return self._residual_std if placed.ends_branch else self._std

    def freeze(self, names: Set[str]) -> None:
        """Make the parameters of these global names not require gradients."""
        for placed in self.placed_parameters:
            if placed.shards[0].spec.name in names:
                placed.parameter.requires_grad_(False)

    def num_parameters(self, without: Set[str] = frozenset()) -> int:
        """Return the number of parameters that this rank holds, without padding and without the global names given."""
        shards = (shard for placed in self.placed_parameters for shard in placed.shards)
        return sum(shard.source.numel for shard in shards if shard.spec.name not in without)
