"""The two families written the plainest way, to compare megalite's against: one process, nn.Linear by nn.Linear."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.config import GPT2Config, LlamaConfig, ModelConfig


def turn(x: Tensor, theta: float, positions: Tensor) -> Tensor:
    """Rotary embedding of ``[B, heads, S, D]`` at positions ``[B, S]``, as complex numbers."""
    half = x.shape[-1] // 2
    rates = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions[:, None, :, None].double() * rates
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.exp(1j * angles)
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


class ReferenceModel(nn.Module):
    """Weights by their global names in a dict; ``forward(ids, targets)`` gives the mean loss.

    With `documents` ``[B, S]``, the number of the document that each token belongs to, tokens see their own only.
    """

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.weights = nn.ParameterDict({k.replace(".", "/"): nn.Parameter(v.clone()) for k, v in weights.items()})

    def w(self, name: str) -> Tensor:
        return self.weights[name.replace(".", "/")]

    def linear(self, name: str, x: Tensor) -> Tensor:
        key = f"{name}/bias".replace(".", "/")
        return F.linear(x, self.w(f"{name}.weight"), self.weights.get(key))

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.w(f"{name}.weight")
        if isinstance(self.config, LlamaConfig):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps) * weight
        assert isinstance(self.config, GPT2Config)
        return F.layer_norm(x, weight.shape, weight, self.w(f"{name}.bias"), self.config.layer_norm_epsilon)

    def attention(self, name: str, x: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        q, k, v = (
            self.linear(f"{name}.{part}", x).unflatten(-1, (n, -1)).transpose(1, 2)
            for part, n in (("query", heads), ("key", kv_heads), ("value", kv_heads))
        )
        if isinstance(config, LlamaConfig):
            q, k = (turn(t, config.rope_theta, positions) for t in (q, k))
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        seen = causal & (documents[:, None, :, None] == documents[:, None, None, :])
        mixed = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
        return self.linear(f"{name}.output", mixed.transpose(1, 2).flatten(2))

    def mlp(self, name: str, x: Tensor) -> Tensor:
        if isinstance(self.config, LlamaConfig):
            gate = self.linear(f"{name}.gate", x)
            return self.linear(f"{name}.down", gate * gate.sigmoid() * self.linear(f"{name}.up", x))
        return self.linear(f"{name}.down", F.gelu(self.linear(f"{name}.up", x), approximate="tanh"))

    def forward(
        self, ids: Tensor, targets: Tensor, positions: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        return self.losses(ids, targets, positions, documents).mean()

    def losses(
        self, ids: Tensor, targets: Tensor, positions: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """The loss of each token, ``[B, S]``."""
        positions = torch.arange(ids.shape[1]).expand(ids.shape) if positions is None else positions
        documents = torch.zeros_like(ids) if documents is None else documents
        x = F.embedding(ids, self.w("embedding.tokens.weight"))
        if isinstance(self.config, GPT2Config):
            x = x + F.embedding(positions, self.w("embedding.positions.weight"))
        for layer in range(self.config.num_hidden_layers):
            name = f"layers.{layer}"
            x = x + self.attention(f"{name}.attention", self.norm(f"{name}.attention_norm", x), positions, documents)
            x = x + self.mlp(f"{name}.mlp", self.norm(f"{name}.mlp_norm", x))
        head = "embedding.tokens.weight" if self.config.tie_word_embeddings else "head.weight"
        logits = self.norm("final_norm", x) @ self.w(head).T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
