"""The model of the peers: a Llama in plain torch, written the way most people write it.

Shapes: B sequences, S positions, H hidden, N heads, D head dim, V vocabulary.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workload import Job


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467)."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(job.hidden_size))
        self.eps = job.rms_norm_eps

    def forward(self, x_BSH: Tensor) -> Tensor:
        return F.rms_norm(x_BSH, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions (arXiv:2104.09864) through torch's SDPA."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, job: Job) -> None:
        super().__init__()
        hidden = job.hidden_size
        self.head_dim = hidden // job.num_attention_heads
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        frequencies = job.rope_theta ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = torch.outer(torch.arange(job.sequence_length), frequencies)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        heads = (*x_BSH.shape[:2], -1, self.head_dim)
        q, k, v = (proj(x_BSH).view(heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        attended = F.scaled_dot_product_attention(self._rotate(q), self._rotate(k), v, is_causal=True)
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _rotate(self, x_BNSD: Tensor) -> Tensor:
        cosine, sine = self.cosine.to(x_BNSD.dtype), self.sine.to(x_BNSD.dtype)
        first, second = x_BNSD.chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(job.hidden_size, job.intermediate_size, bias=False)
        self.up_proj = nn.Linear(job.hidden_size, job.intermediate_size, bias=False)
        self.down_proj = nn.Linear(job.intermediate_size, job.hidden_size, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BSH)) * self.up_proj(x_BSH))


class Embedding(nn.Embedding):
    """Token ids [B, S] to hidden [B, S, H]."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.vocab_size, job.hidden_size)
        initialise(self, job, 0)

    def project(self, x_BSH: Tensor) -> Tensor:
        """Hidden [B, S, H] to logits [B, S, V] by the same table, for tied embeddings."""
        return F.linear(x_BSH, self.weight)


class Block(nn.Module):
    """One layer: attention and MLP, each behind its norm, each added to the residual."""

    def __init__(self, job: Job, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(job)
        self.self_attn = Attention(job)
        self.post_attention_layernorm = RMSNorm(job)
        self.mlp = MLP(job)
        initialise(self, job, index + 1)

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_BSH = x_BSH + self.self_attn(self.input_layernorm(x_BSH))
        return x_BSH + self.mlp(self.post_attention_layernorm(x_BSH))


class Head(nn.Linear):
    """Hidden [B, S, H] to logits [B, S, V] by a table of its own."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.hidden_size, job.vocab_size, bias=False)
        initialise(self, job, job.num_hidden_layers + 1)


class Llama(nn.Module):
    """The whole model with its loss (arXiv:2302.13971)."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.embed_tokens = Embedding(job)
        self.layers = nn.ModuleList(Block(job, index) for index in range(job.num_hidden_layers))
        self.norm = RMSNorm(job)
        self.lm_head = Head(job)
        if job.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        x_BSH = self.embed_tokens(ids_BS)
        for layer in self.layers:
            x_BSH = layer(x_BSH)
        return cross_entropy(self.lm_head(self.norm(x_BSH)), labels_BS)


def cross_entropy(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Mean loss over the tokens, in fp32."""
    return F.cross_entropy(logits_BSV.float().flatten(0, 1), labels_BS.flatten())


def initialise(module: nn.Module, job: Job, index: int) -> None:
    """Draw every matrix from (seed, index of the layer), so that a pipeline stage starts from the same weights."""
    generator = torch.Generator().manual_seed(job.seed * 1009 + index)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=job.initializer_range, generator=generator)


def adamw(parameters: Iterable[nn.Parameter], job: Job) -> torch.optim.AdamW:
    """The optimizer of every peer: torch's fused kernel (see adamw.py), matrices with weight decay, norms without."""
    by_dim: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in parameters:
        by_dim[parameter.dim() > 1].append(parameter)
    groups = [
        {"params": by_dim[False], "weight_decay": 0.0},
        {"params": by_dim[True], "weight_decay": job.weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=job.lr, betas=job.betas, eps=job.eps, fused=True)
