"""A decoder-only Transformer block: that of Llama (arXiv:2307.09288), of GPT-2 or of GPT-NeoX (arXiv:2204.06745).

|             | llama                            | gpt2                      | gpt_neox                        |
|-------------|----------------------------------|---------------------------|---------------------------------|
| norm        | RMSNorm (arXiv:1910.07467)       | LayerNorm                 | LayerNorm                       |
| positions   | rotary (arXiv:2104.09864)        | learned, at the embedding | rotary, on a part of each head  |
| heads       | grouped-query (arXiv:2305.13245) | multi-head                | multi-head                      |
| q and k     | plain, or normed (Qwen3)         | plain                     | plain                           |
| MLP         | SwiGLU (arXiv:2002.05202)        | GELU, tanh form           | GELU, exact or tanh form        |
| biases      | none, or where they are asked for | everywhere               | everywhere, or not in attention |
| MLP reads   | what attention leaves            | what attention leaves     | the same as attention, or that  |

Query, key and value are one product, gate and up another, whatever their names in checkpoints. Legend for shapes:
B microbatch, S sequence, H hidden, N local query heads, K local key-value heads, D head dim, R dims of it that turn.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.config import GPT2Config, GPTNeoXConfig, LlamaConfig, ModelConfig, RopeScaling, RotaryConfig
from megalite.kernels.choice import NATIVE, AttentionKernel, Kernels
from megalite.model.activation_checkpointing import recomputed
from megalite.model.dropout import DropoutStreams, ScoreDropout
from megalite.model.kv_cache import LayerCache
from megalite.model.packing import PackedDocuments
from megalite.parallel.sharding import ShardSpec
from megalite.parallel.tensor_group import TensorGroup
from megalite.tensor_parallel.collectives import copy_to_group, enter_parallel_region
from megalite.tensor_parallel.layers import ColumnParallelLinear, ReplicatedKVLinear, RowParallelLinear, ShardedModule


def head_dim(config: ModelConfig) -> int:
    """Width of one attention head."""
    return config.head_dim or config.hidden_size // config.num_attention_heads


def make_norm(config: ModelConfig) -> nn.Module:
    """Return the family's norm over the hidden dim: whole, the same on every tensor rank."""
    if isinstance(config, LlamaConfig):
        return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    assert isinstance(config, GPT2Config | GPTNeoXConfig)
    eps = config.layer_norm_epsilon if isinstance(config, GPT2Config) else config.layer_norm_eps
    return nn.LayerNorm(config.hidden_size, eps=eps)


class Rotary:
    """Rotary position embedding: head dims (i, i + R/2) turn together by ``position * theta ** (-2i / R)``.

    R is D, or less where only a head's first R dims turn; with scaling the angles are smaller.

    The tables are no buffers: a module cast to bf16 would cast its buffers, and angles of thousands need fp32. They
    are made in fp32 and only cosine and sine are rounded, once for each device and precision.
    """

    def __init__(self, config: RotaryConfig) -> None:
        dim, still = config.rotary_dim, config.head_dim - config.rotary_dim
        self._parts = [dim // 2, dim // 2] + [still] * (still > 0)
        rates = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        if isinstance(config, LlamaConfig) and config.rope_scaling is not None:
            rates = scaled_rates(rates, config.rope_scaling)
        angles = torch.arange(config.max_position_embeddings, dtype=torch.float64)[:, None] * rates
        self._tables = (angles.cos().float(), angles.sin().float())
        self._cache: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, x_BSND: Tensor, positions_BS: Tensor | None = None) -> Tensor:
        """Turn queries or keys ``[B, S, heads, D]`` at their positions, or at 0..S-1."""
        key = (x_BSND.device, x_BSND.dtype)
        if key not in self._cache:
            cos, sin = self._tables
            self._cache[key] = (cos.to(*key).unsqueeze(1), sin.to(*key).unsqueeze(1))
        places = slice(x_BSND.shape[1]) if positions_BS is None else positions_BS
        cos, sin = (table[places] for table in self._cache[key])
        first, second, *still = x_BSND.split(self._parts, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, *still), dim=-1)


def scaled_rates(rates: Tensor, scaling: RopeScaling) -> Tensor:
    """Return rotary rates, in radians a position, that are slowed for longer sequences.

    By one factor (arXiv:2306.15595), or with Llama 3.1 (arXiv:2407.21783) by how often each turns over the positions of
    the first training: the slow by the factor, the fast not at all, those between in proportion.
    """
    slowed = rates / scaling.factor
    if scaling.rope_type == "linear":
        return slowed
    low, high, positions = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert low is not None
    assert high is not None
    assert positions is not None
    turns = rates * positions / (2 * pi)
    return slowed.lerp(rates, ((turns - low) / (high - low)).clamp(0, 1))


class QueryKeyNorm(ShardedModule):
    """RMSNorm over each head of queries and keys, as in Qwen3: a weight ``[D]`` for all query heads, one for all keys.

    Takes and returns ``[B, S, N + K, D]``. The weights are whole on every rank, and each rank sees its own heads only:
    the gradients are summed over the group. That is right for a key head that several ranks compute, too, since each
    has the gradient of its own queries alone.
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
    """Causal self-attention, within documents where they are packed, with its heads divided over the tensor group.

    Takes and returns ``[B, S, H]``, the same on every rank; with a `cache` the tokens follow those in it. Where there
    are fewer key-value heads than ranks, the ranks that share a head each compute it, from a weight that all hold
    whole. With `rows`, which is B, this rank's share of the tokens comes and goes.
    """

    def __init__(self, config: ModelConfig, group: TensorGroup, rotary: Rotary | None, rows: int | None = None) -> None:
        super().__init__()
        self.group, self.rows = group, rows
        hidden, self.head_dim = config.hidden_size, head_dim(config)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        bias, output_bias = _attention_biases(config)
        self.rotary = rotary
        self.recompute_core = False
        """Recompute scores, softmax and dropout in the backward, and keep queries, keys and values alone."""
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
        if isinstance(config, LlamaConfig) and config.qk_norm:
            self.query_key_norm = QueryKeyNorm(
                self.heads, self.kv_heads, self.head_dim, eps=config.rms_norm_eps, group=group
            )
        self.output = RowParallelLinear(width, hidden, group=group, bias=output_bias)

    def forward(
        self,
        x_BSH: Tensor,
        packing: PackedDocuments | None = None,
        cache: LayerCache | None = None,
        dropout: DropoutStreams | None = None,
    ) -> Tensor:
        qkv = self._projected(x_BSH).unflatten(-1, (-1, self.head_dim))
        # Queries and keys turn together, as one tensor.
        turned, value = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        if self.query_key_norm is not None:
            turned = self.query_key_norm(turned)
        if self.rotary is not None:
            places = packing or cache
            turned = self.rotary(turned, places.positions_BS if places else None)
        query, key = turned.split((self.heads, self.kv_heads), dim=2)
        if cache is not None:
            cache.append(key, value)
        if cache is None or cache.first_read:
            spans = packing.spans if packing else None
            scores = dropout.scores(range(self.first_head, self.first_head + self.heads)) if dropout else None
            if self.recompute_core:
                attended = recomputed(causal_attention, query, key, value, spans, scores, self.group.kernels)
            else:
                attended = causal_attention(query, key, value, spans, scores, self.group.kernels)
        else:
            attended = cache.attend(query, self.group.kernels)
        return self.output(attended.flatten(2))

    def _projected(self, x_BSH: Tensor) -> Tensor:
        """Return queries, keys and values of this rank's heads, side by side, of all tokens ``[B, S, ...]``."""
        if self.key_value is None:
            qkv = self.qkv(x_BSH)
        else:
            x_BSH = enter_parallel_region(x_BSH, self.group)
            qkv = torch.cat((self.qkv(x_BSH, gathered=True), self.key_value(x_BSH, gathered=True)), dim=-1)
        return qkv if self.rows is None else qkv.view(self.rows, -1, qkv.shape[-1])


def _attention_biases(config: ModelConfig) -> tuple[bool, bool]:
    """Whether query, key and value have biases, and whether the output projection has one."""
    if isinstance(config, LlamaConfig):
        return config.attention_bias, config.attention_output_bias
    on = not isinstance(config, GPTNeoXConfig) or config.attention_bias
    return on, on


def causal_attention(
    query_BSND: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    spans: list[int] | None = None,
    dropout: ScoreDropout | None = None,
    kernels: Kernels = NATIVE,
) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v under the causal mask, ``[B, S, N, D]``; query head i reads head i*K//N.

    With `spans`, lengths that sum to B*S, the rows are one stretch of tokens cut into these: none sees another. With
    `dropout` of the probabilities, all of them are held, on any device, with a byte each for the mask. Where `kernels`
    widen 16-bit products, all of attention is computed in fp32, and rounded at its end.
    """
    dtype = query_BSND.dtype
    query_BSND, key_BSKD, value_BSKD = kernels.upcast(query_BSND, key_BSKD, value_BSKD)
    return _causal_attention(query_BSND, key_BSKD, value_BSKD, spans, dropout, kernels.attention).to(dtype)


def _causal_attention(
    query_BSND: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    spans: list[int] | None,
    dropout: ScoreDropout | None,
    kernel: AttentionKernel,
) -> Tensor:
    rows, length = query_BSND.shape[:2]
    tokens = rows * length
    if spans is None:
        whole = [(row, 0) for row in range(rows)]
        return _attention(query_BSND, key_BSKD, value_BSKD, tokens, dropout, whole, kernel)
    # Document by document no score across two of them is ever computed, and no mask is held.
    queries, keys, values = (
        x.flatten(0, 1).unsqueeze(0).split(spans, dim=1) for x in (query_BSND, key_BSKD, value_BSKD)
    )
    starts = accumulate(spans[:-1], initial=0)
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
    dropout: ScoreDropout | None,
    documents: Sequence[tuple[int, int]],
    kernel: AttentionKernel,
) -> Tensor:
    """Attend within each of B documents, whose (row, first token) in the microbatch are `documents`."""
    query, key, value = (x.transpose(1, 2) for x in (query_BSND, key_BSKD, value_BSKD))
    heads, length = query.shape[1:3]
    if key.shape[1] != heads:
        # Expanded here, since not every kernel behind torch's own flag for grouped queries is a fused one.
        key, value = (x.repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
    if dropout is not None:
        kept = dropout.kept(documents, length, query.device)
        return _written_out_attention(query, key, value, kept, dropout.scale).transpose(1, 2)
    fits = query.device.type == "cpu" and heads * length * microbatch_tokens <= WRITTEN_OUT_SCORES
    if kernel == "written_out" and fits:
        return _written_out_attention(query, key, value).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


# On a CPU with bf16 units, plain matrix products take half the time of torch's fused kernel (benchmarks/attention.py).
# On others they take as long. They keep the scores for the backward, so this many of them at the most: 16 MiB of bf16
# per layer and microbatch. Each document may keep its tokens' share of that.
WRITTEN_OUT_SCORES = 1 << 23


def _written_out_attention(
    query_BNSD: Tensor, key_BNSD: Tensor, value_BNSD: Tensor, kept: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """The same as one product after the other, in strips of queries that leave out the keys after them.

    Of the probabilities those stay, times `scale`, where `kept` ``[B*N, S, S]`` is true.
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
        if kept is not None:
            probabilities = probabilities * kept[:, start:end, :end] * scale
        outputs.append(probabilities @ value[:, :end])
    return torch.cat(outputs, dim=1).view(batch, heads, length, width)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``, its inner width divided over the group; ``[B, S, H]`` in and out."""

    def __init__(self, config: LlamaConfig, group: TensorGroup) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, _inner_size(config), config.mlp_bias
        self.gate_up = ColumnParallelLinear(
            hidden, 2 * inner, group=group, bias=bias, parts={"gate": inner, "up": inner}
        )
        self.down = RowParallelLinear(inner, hidden, group=group, bias=bias)

    def forward(self, x_BSH: Tensor) -> Tensor:
        gate, up = self.gate_up(x_BSH).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class GeluMLP(nn.Module):
    """``down(gelu(up(x)))`` with biases, its inner width divided over the group; ``[B, S, H]`` in and out.

    GELU has its exact form or that with tanh (arXiv:1606.08415).
    """

    def __init__(self, config: ModelConfig, group: TensorGroup) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, _inner_size(config)
        exact = isinstance(config, GPTNeoXConfig) and config.hidden_act == "gelu"
        self.approximate = "none" if exact else "tanh"
        self.up = ColumnParallelLinear(hidden, inner, group=group, bias=True)
        self.down = RowParallelLinear(inner, hidden, group=group, bias=True)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BSH), approximate=self.approximate))


class Block(nn.Module):
    """One pre-norm layer: attention and MLP, each added to the residual stream ``[B, S, H]``.

    The MLP reads the stream after attention or, in GPT-NeoX's parallel form, beside it. With `rows`, which is
    B, the stream is this rank's share of the tokens ``[1, B*S / size, H]``.

    `rotary` is shared by the blocks of a stage; None where positions are learned. `dropout` has the streams of this
    layer.
    """

    def __init__(self, config: ModelConfig, group: TensorGroup, rotary: Rotary | None, rows: int | None = None) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, group, rotary, rows)
        self.mlp_norm = make_norm(config)
        self.mlp = SwiGLU(config, group) if isinstance(config, LlamaConfig) else GeluMLP(config, group)
        self.parallel = isinstance(config, GPTNeoXConfig) and config.use_parallel_residual

    def forward(
        self,
        x_BSH: Tensor,
        packing: PackedDocuments | None = None,
        cache: LayerCache | None = None,
        dropout: DropoutStreams | None = None,
    ) -> Tensor:
        branch_BSH = self.attention(self.attention_norm(x_BSH), packing, cache, dropout)
        attended_BSH = x_BSH + (dropout.hidden(branch_BSH, "attention") if dropout else branch_BSH)
        branch_BSH = self.mlp(self.mlp_norm(x_BSH if self.parallel else attended_BSH))
        return attended_BSH + (dropout.hidden(branch_BSH, "mlp") if dropout else branch_BSH)


def _inner_size(config: ModelConfig) -> int:
    assert config.intermediate_size is not None  # the configuration fills it in
    return config.intermediate_size
