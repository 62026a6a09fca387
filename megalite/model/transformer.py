"""The modules that decoder-only Transformers are composed of: rotary positions, attention, MLPs, the block.

Query, key and value are one matrix product, and so are gate and up; checkpoints store them as separate tensors. Legend
for shapes: B microbatch, S sequence, H hidden, N local query heads, K local key-value heads, D head dim, R rotary dims
of a head.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.kernels.choice import NATIVE, AttentionKernel, Kernels
from megalite.model.activation_checkpointing import checkpointed
from megalite.model.config import ModelConfig, RopeScaling, RotaryConfig
from megalite.model.dropout import AttentionDropout, DropoutStreams
from megalite.model.kv_cache import LayerKVCache
from megalite.model.packing import PackedDocuments
from megalite.parallel.sharding import ShardSpec
from megalite.parallel.tensor_group import TensorGroup
from megalite.tensor_parallel.collectives import copy_to_group, enter_parallel_region
from megalite.tensor_parallel.layers import ColumnParallelLinear, ReplicatedKVLinear, RowParallelLinear, ShardedModule


class Rotary:
    """Rotary position embedding (RoPE): rotates head dims (i, i + R/2) by ``position * theta ** (-2i / R)`` radians.

    R is D, or less where only the first R dims of a head are rotated. RoPE scaling makes the angles smaller.

    The tables of cosine and sine are not buffers: a module cast to bf16 would cast its buffers, and angles of thousands
    of radians need fp32. They are computed at first use, from fp64 angles, and rounded once for each device and dtype.
    """

    def __init__(self, config: RotaryConfig, scaling: RopeScaling | None = None) -> None:
        dim, unrotated = config.rotary_dim, config.head_dim - config.rotary_dim
        self._parts = [dim // 2, dim // 2] + [unrotated] * (unrotated > 0)
        self._config, self._scaling = config, scaling
        self._cache: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each position and pair, fp32 ``[positions, R / 2]``, on the CPU."""
        dim, positions = self._config.rotary_dim, self._config.max_position_embeddings
        rates = self._config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        if self._scaling is not None:
            rates = scaled_rates(rates, self._scaling)
        angles = torch.arange(positions, dtype=torch.float64)[:, None] * rates
        return angles.cos().float(), angles.sin().float()

    def __call__(self, x_BSND: Tensor, positions_BS: Tensor | None = None) -> Tensor:
        """Rotate queries or keys ``[B, S, heads, D]`` by their positions, 0..S-1 by default."""
        key = (x_BSND.device, x_BSND.dtype)
        if key not in self._cache:
            cos, sin = self._tables
            self._cache[key] = (cos.to(*key).unsqueeze(1), sin.to(*key).unsqueeze(1))
        index = slice(x_BSND.shape[1]) if positions_BS is None else positions_BS
        cos, sin = (table[index] for table in self._cache[key])
        first, second, *unrotated = x_BSND.split(self._parts, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, *unrotated), dim=-1)


def scaled_rates(rates: Tensor, scaling: RopeScaling) -> Tensor:
    """RoPE scaling: return rotary frequencies, in radians per position, that are lowered for longer sequences.

    Linear scaling divides all by one factor (arXiv:2306.15595). Llama 3.1 (arXiv:2407.21783) divides by it the
    frequencies with few turns over the original context length, leaves those with many turns, and interpolates between.
    """
    scaled = rates / scaling.factor
    if scaling.rope_type == "linear":
        return scaled
    low, high, positions = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert low is not None
    assert high is not None
    assert positions is not None
    turns = rates * positions / (2 * pi)
    return scaled.lerp(rates, ((turns - low) / (high - low)).clamp(0, 1))


class QueryKeyNorm(ShardedModule):
    """RMSNorm over each head of queries and keys, as in Qwen3: a weight ``[D]`` for all query heads, one for all keys.

    Takes and returns ``[B, S, N + K, D]``. The weights are replicated, and each rank has only its heads, so their
    gradients are all-reduced over the group. This is also right for a key head that several ranks compute, since each
    rank has the gradient from its queries alone.
    """

    def __init__(self, heads: int, kv_heads: int, width: int, *, eps: float, group: TensorGroup) -> None:
        super().__init__()
        self.group, self.heads, self.kv_heads, self.eps, self.fused = group, heads, kv_heads, eps, True
        self.shard_specs = {"weight": tuple(ShardSpec(f"{part}_norm.weight", (width,)) for part in ("query", "key"))}
        self.weight = nn.Parameter(torch.empty(2 * width))

    def forward(self, x_BSND: Tensor) -> Tensor:
        query_D, key_D = copy_to_group(self.weight, self.group).chunk(2)
        weight_ND = torch.cat((query_D.expand(self.heads, -1), key_D.expand(self.kv_heads, -1)))
        return F.rms_norm(x_BSND, x_BSND.shape[-1:], eps=self.eps) * weight_ND


class Attention(nn.Module):
    """Causal self-attention, within packed documents if there are any, with heads divided over the tensor group.

    Takes and returns ``[B, S, H]``, the same on every rank; with a `cache` the tokens follow those in the KV cache.
    With fewer key-value heads than ranks, the key and value projections are replicated, and each rank computes the head
    that it needs. With `rows`, which is B, takes and returns this rank's share of the tokens (sequence parallelism).

    `rotary`, which the blocks of a stage share, is None where positions are learned. `bias` is that of the query, key
    and value projections, `output_bias` that of the output projection. With `query_key_eps`, the epsilon of a
    `QueryKeyNorm`, queries and keys are normalised.
    """

    def __init__(
        self,
        config: ModelConfig,
        group: TensorGroup,
        rows: int | None = None,
        *,
        rotary: Rotary | None,
        bias: bool,
        output_bias: bool,
        query_key_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.group, self.rows = group, rows
        hidden, self.head_dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.rotary = rotary
        self.recompute_core = False
        """Selective activation checkpointing: recompute scores, softmax and dropout, save queries, keys and values."""
        self.heads = heads // group.size
        self.first_head = group.rank * self.heads
        self.kv_heads = max(1, kv_heads // group.size)
        kv_width, width = kv_heads * self.head_dim, heads * self.head_dim
        self.key_value: ReplicatedKVLinear | None = None
        parts = {"query": width, "key": kv_width, "value": kv_width}
        if kv_heads < group.size:
            kv_head = group.rank * kv_heads // group.size
            head = slice(kv_head * self.head_dim, (kv_head + 1) * self.head_dim)
            self.key_value = ReplicatedKVLinear(
                hidden, {"key": kv_width, "value": kv_width}, head, group=group, bias=bias
            )
            parts = {"query": width}
        self.qkv = ColumnParallelLinear(hidden, sum(parts.values()), group=group, bias=bias, parts=parts)
        self.query_key_norm: QueryKeyNorm | None = None
        if query_key_eps is not None:
            self.query_key_norm = QueryKeyNorm(self.heads, self.kv_heads, self.head_dim, eps=query_key_eps, group=group)
        self.output = RowParallelLinear(width, hidden, group=group, bias=output_bias)

    def flops_per_token(self, sequence_length: int) -> float:
        """Return the FLOPs of one token's scores, forward and backward over all heads: 12 * width * sequence.

        They are those of the full square of scores, as in the literature (arXiv:2204.02311, appendix B); the causal
        half that kernels skip is not subtracted.
        """
        return 12.0 * self.heads * self.group.size * self.head_dim * sequence_length

    def forward(
        self,
        x_BSH: Tensor,
        packing: PackedDocuments | None = None,
        cache: LayerKVCache | None = None,
        dropout: DropoutStreams | None = None,
    ) -> Tensor:
        qkv = self._project_qkv(x_BSH).unflatten(-1, (-1, self.head_dim))
        # Queries and keys are normalised and rotated as one tensor.
        query_key, value = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        if self.query_key_norm is not None:
            query_key = self.query_key_norm(query_key)
        if self.rotary is not None:
            positions = packing or cache
            query_key = self.rotary(query_key, positions.positions_BS if positions else None)
        query, key = query_key.split((self.heads, self.kv_heads), dim=2)
        if cache is not None:
            cache.append(key, value)
        if cache is None or cache.is_prefill:
            document_lengths = packing.document_lengths if packing else None
            scores = dropout.scores(range(self.first_head, self.first_head + self.heads)) if dropout else None
            if self.recompute_core:
                attended = checkpointed(
                    causal_attention, query, key, value, document_lengths, scores, self.group.kernels
                )
            else:
                attended = causal_attention(query, key, value, document_lengths, scores, self.group.kernels)
        else:
            attended = cache.attend(query, self.group.kernels)
        return self.output(attended.flatten(2))

    def _project_qkv(self, x_BSH: Tensor) -> Tensor:
        """Return queries, keys and values of this rank's heads, concatenated, for all tokens ``[B, S, ...]``."""
        if self.key_value is None:
            qkv = self.qkv(x_BSH)
        else:
            x_BSH = enter_parallel_region(x_BSH, self.group)
            qkv = torch.cat((self.qkv(x_BSH, gathered=True), self.key_value(x_BSH, gathered=True)), dim=-1)
        return qkv if self.rows is None else qkv.view(self.rows, -1, qkv.shape[-1])


def causal_attention(
    query_BSND: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    document_lengths: list[int] | None = None,
    dropout: AttentionDropout | None = None,
    kernels: Kernels = NATIVE,
) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v under the causal mask, ``[B, S, N, D]``; query head i reads head i*K//N.

    `document_lengths`, which sum to B*S, cut the flattened rows into documents; attention is limited to a document.
    `dropout` of the probabilities needs memory for all of them, and a byte each for the mask, on any device. Where
    `kernels` upcast 16-bit products, all of attention is computed in fp32 and rounded at the end.
    """
    dtype = query_BSND.dtype
    query_BSND, key_BSKD, value_BSKD = kernels.upcast(query_BSND, key_BSKD, value_BSKD)
    return _causal_attention(query_BSND, key_BSKD, value_BSKD, document_lengths, dropout, kernels.attention).to(dtype)


def _causal_attention(
    query_BSND: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    document_lengths: list[int] | None,
    dropout: AttentionDropout | None,
    kernel: AttentionKernel,
) -> Tensor:
    rows, length = query_BSND.shape[:2]
    tokens = rows * length
    if document_lengths is None:
        whole = [(row, 0) for row in range(rows)]
        return _attention(query_BSND, key_BSKD, value_BSKD, tokens, dropout, whole, kernel)
    # One document at a time: no scores between documents are computed, and no mask is needed.
    queries, keys, values = (
        x.flatten(0, 1).unsqueeze(0).split(document_lengths, dim=1) for x in (query_BSND, key_BSKD, value_BSKD)
    )
    starts = accumulate(document_lengths[:-1], initial=0)
    attended = [
        _attention(query, key, value, tokens, dropout, [divmod(start, length)], kernel)
        for query, key, value, start in zip(queries, keys, values, starts, strict=True)
    ]
    return torch.cat(attended, dim=1).view(query_BSND.shape)


def _attention(
    query_BSND: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    microbatch_tokens: int,
    dropout: AttentionDropout | None,
    documents: Sequence[tuple[int, int]],
    kernel: AttentionKernel,
) -> Tensor:
    """Attention within each of B documents, whose (row, first token) in the microbatch are `documents`."""
    query, key, value = (x.transpose(1, 2) for x in (query_BSND, key_BSKD, value_BSKD))
    heads, length = query.shape[1:3]
    if key.shape[1] != heads:
        # Expanded here, since with torch's flag for grouped queries not every kernel is fused.
        key, value = (x.repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
    if dropout is not None:
        keep_mask = dropout.keep_mask(documents, length, query.device)
        return _written_out_attention(query, key, value, keep_mask, dropout.scale).transpose(1, 2)
    fits = query.device.type == "cpu" and heads * length * microbatch_tokens <= WRITTEN_OUT_SCORES
    if kernel == "written_out" and fits:
        return _written_out_attention(query, key, value).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


# On a CPU with bf16 units, plain matrix products take half the time of torch's fused kernel (benchmarks/attention.py);
# on other CPUs they take as long. They save the scores for the backward, so their number is limited: 16 MiB of bf16 per
# layer and microbatch, of which each document may use the share of its tokens.
WRITTEN_OUT_SCORES = 1 << 23


def _written_out_attention(
    query_BNSD: Tensor, key_BNSD: Tensor, value_BNSD: Tensor, keep_mask: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Causal attention as plain matrix products, in strips of queries that skip the keys after the strip.

    With dropout, probabilities are multiplied by `scale` where `keep_mask` ``[B*N, S, S]`` is True, else set to 0.
    """
    batch, heads, length, width = query_BNSD.shape
    query, key, value = (x.reshape(batch * heads, length, width) for x in (query_BNSD, key_BNSD, value_BNSD))
    mask = query.new_full((length, length), float("-inf")).triu_(1)
    strip = max(128, -(-length // 4))
    outputs = []
    for start in range(0, length, strip):
        end = min(start + strip, length)
        scores = torch.baddbmm(
            mask[start:end, :end], query[:, start:end], key[:, :end].transpose(1, 2), alpha=width**-0.5
        )
        probabilities = scores.softmax(-1)
        if keep_mask is not None:
            probabilities = probabilities * keep_mask[:, start:end, :end] * scale
        outputs.append(probabilities @ value[:, :end])
    return torch.cat(outputs, dim=1).view(batch, heads, length, width)


class SwiGLU(nn.Module):
    """SwiGLU MLP, ``down(silu(gate(x)) * up(x))``, with its inner width divided over the group; takes ``[B, S, H]``."""

    def __init__(self, config: ModelConfig, group: TensorGroup, *, bias: bool) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = ColumnParallelLinear(
            hidden, 2 * inner, group=group, bias=bias, parts={"gate": inner, "up": inner}
        )
        self.down = RowParallelLinear(inner, hidden, group=group, bias=bias)

    def forward(self, x_BSH: Tensor) -> Tensor:
        gate, up = self.gate_up(x_BSH).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class GeluMLP(nn.Module):
    """GELU MLP, ``down(gelu(up(x)))`` with biases, with its inner width divided over the group; takes ``[B, S, H]``.

    GELU is `exact` or the tanh approximation (arXiv:1606.08415).
    """

    def __init__(self, config: ModelConfig, group: TensorGroup, *, exact: bool = False) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.approximate = "none" if exact else "tanh"
        self.up = ColumnParallelLinear(hidden, inner, group=group, bias=True)
        self.down = RowParallelLinear(inner, hidden, group=group, bias=True)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BSH), approximate=self.approximate))


class Block(nn.Module):
    """A pre-norm Transformer layer: attention and MLP, each added to the residual stream ``[B, S, H]``.

    The input of the MLP is the stream after attention or, with `parallel`, the stream before it (GPT-NeoX). With
    sequence parallelism, the stream is this rank's share of the tokens, ``[1, B*S / size, H]``. `dropout` holds the
    dropout masks of this layer.
    """

    def __init__(
        self,
        attention_norm: nn.Module,
        attention: Attention,
        mlp_norm: nn.Module,
        mlp: nn.Module,
        parallel: bool = False,
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention, self.mlp_norm, self.mlp = attention_norm, attention, mlp_norm, mlp
        self.parallel = parallel

    def forward(
        self,
        x_BSH: Tensor,
        packing: PackedDocuments | None = None,
        cache: LayerKVCache | None = None,
        dropout: DropoutStreams | None = None,
    ) -> Tensor:
        branch_BSH = self.attention(self.attention_norm(x_BSH), packing, cache, dropout)
        attended_BSH = x_BSH + (dropout.hidden(branch_BSH, "attention") if dropout else branch_BSH)
        branch_BSH = self.mlp(self.mlp_norm(x_BSH if self.parallel else attended_BSH))
        return attended_BSH + (dropout.hidden(branch_BSH, "mlp") if dropout else branch_BSH)
