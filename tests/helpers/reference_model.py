"""The families written the plainest way, to compare megalite's against: one process, nn.Linear by nn.Linear."""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.model.config import ModelConfig, RopeScaling, RotaryConfig
from megalite.model.families.gpt2.config import GPT2Config
from megalite.model.families.gpt_neox.config import GPTNeoXConfig
from megalite.model.families.llama.config import LlamaConfig
from megalite.model.stage import Stage
from megalite.parallel.tensor_group import TensorGroup


def turn(x: Tensor, config: RotaryConfig, positions: Tensor) -> Tensor:
    """Rotary embedding of ``[B, heads, S, D]`` at positions ``[B, S]``, as complex numbers."""
    width = int(x.shape[-1] * config.rotary_pct) if isinstance(config, GPTNeoXConfig) else x.shape[-1]
    scaling = config.rope_scaling if isinstance(config, LlamaConfig) else None
    half = width // 2
    rates = [slowed(config.rope_theta ** (-pair / half), scaling) for pair in range(half)]
    angles = positions[:, None, :, None].double() * torch.tensor(rates, dtype=torch.float64)
    turned = torch.complex(x[..., :half].double(), x[..., half:width].double()) * torch.exp(1j * angles)
    return torch.cat((turned.real, turned.imag, x[..., width:]), dim=-1).to(x.dtype)


def slowed(rate: float, scaling: RopeScaling | None) -> float:
    """One rate, case by case: in Llama 3.1 by its wavelength, as published."""
    if scaling is None:
        return rate
    if scaling.rope_type == "linear":
        return rate / scaling.factor
    low, high, positions = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert low is not None
    assert high is not None
    assert positions is not None
    wavelength = 2 * math.pi / rate
    if wavelength < positions / high:
        return rate
    if wavelength > positions / low:
        return rate / scaling.factor
    share = (positions / wavelength - low) / (high - low)
    return (1 - share) * rate / scaling.factor + share * rate


@dataclass(frozen=True)
class PlainDropout:
    """The masks of megalite/model/dropout.py by its documentation, element for element, drawn whole."""

    seed: int
    samples: tuple[int, ...]
    hidden: float
    attention: float

    def draw(self, *key: object, shape: tuple[int, int]) -> Tensor:
        digest = hashlib.blake2b(" ".join(map(str, (self.seed, *key))).encode(), digest_size=8).digest()
        number = sum(byte << (8 * place) for place, byte in enumerate(digest))
        return torch.rand(shape, generator=torch.Generator().manual_seed(number))

    def drop_hidden(self, site: str, x: Tensor) -> Tensor:
        dropped = torch.zeros_like(x)
        for row, sample in enumerate(self.samples):
            for token in range(x.shape[1]):
                numbers = self.draw(sample, site, token // 64, shape=(64, x.shape[2]))[token % 64]
                dropped[row, token] = torch.where(numbers < 1 - self.hidden, x[row, token] / (1 - self.hidden), 0.0)
        return dropped

    def drop_scores(self, site: str, scores: Tensor, documents: Tensor) -> Tensor:
        """Drop probabilities ``[B, heads, S, S]``."""
        dropped = torch.zeros_like(scores)
        for row, sample in enumerate(self.samples):
            for document in documents[row].unique():
                places = (documents[row] == document).nonzero().flatten()
                start, end = int(places[0]), int(places[-1]) + 1
                for head in range(scores.shape[1]):
                    numbers = self.draw(sample, site, head, start, shape=(end - start, end - start))
                    scaled = scores[row, head, start:end, start:end] / (1 - self.attention)
                    dropped[row, head, start:end, start:end] = torch.where(numbers < 1 - self.attention, scaled, 0.0)
        return dropped


class ReferenceModel(nn.Module):
    """Weights by their global names in a dict; ``forward(ids, targets)`` gives the mean loss.

    With `documents` ``[B, S]``, the number of the document that each token belongs to, tokens see their own only.
    """

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], dropout: PlainDropout | None = None) -> None:
        super().__init__()
        self.dropout = dropout
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
        eps = {"gpt2": "layer_norm_epsilon", "gpt_neox": "layer_norm_eps"}[self.config.architecture]
        return F.layer_norm(x, weight.shape, weight, self.w(f"{name}.bias"), getattr(self.config, eps))

    def attention(self, name: str, x: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        q, k, v = (
            self.linear(f"{name}.{part}", x).unflatten(-1, (n, -1)).transpose(1, 2)
            for part, n in (("query", heads), ("key", kv_heads), ("value", kv_heads))
        )
        if isinstance(config, LlamaConfig) and config.qk_norm:
            q, k = self.norm(f"{name}.query_norm", q), self.norm(f"{name}.key_norm", k)
        if isinstance(config, RotaryConfig):
            q, k = (turn(t, config, positions) for t in (q, k))
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        seen = causal & (documents[:, None, :, None] == documents[:, None, None, :])
        shares = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        if self.dropout is not None:
            shares = self.dropout.drop_scores(name.replace("attention", "scores"), shares, documents)
        mixed = shares @ v
        return self.linear(f"{name}.output", mixed.transpose(1, 2).flatten(2))

    def dropped(self, site: str, x: Tensor) -> Tensor:
        return x if self.dropout is None else self.dropout.drop_hidden(site, x)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        if isinstance(self.config, LlamaConfig):
            gate = self.linear(f"{name}.gate", x)
            return self.linear(f"{name}.down", gate * gate.sigmoid() * self.linear(f"{name}.up", x))
        inner = self.linear(f"{name}.up", x)
        if isinstance(self.config, GPTNeoXConfig) and self.config.hidden_act == "gelu":
            return self.linear(f"{name}.down", inner * 0.5 * (1 + torch.erf(inner / 2**0.5)))
        return self.linear(f"{name}.down", F.gelu(inner, approximate="tanh"))

    def forward(
        self, ids: Tensor, targets: Tensor, positions: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        return self.losses(ids, targets, positions, documents).mean()

    def losses(
        self, ids: Tensor, targets: Tensor, positions: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """The loss of each token, ``[B, S]``."""
        logits = self.logits(ids, positions, documents)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)

    def logits(self, ids: Tensor, positions: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """The logits after each token, ``[B, S, V]``."""
        positions = torch.arange(ids.shape[1]).expand(ids.shape) if positions is None else positions
        documents = torch.zeros_like(ids) if documents is None else documents
        x = F.embedding(ids, self.w("embedding.tokens.weight"))
        if isinstance(self.config, GPT2Config):
            x = x + F.embedding(positions, self.w("embedding.positions.weight"))
        x = self.dropped("embedding", x)
        for layer in range(self.config.num_hidden_layers):
            name = f"layers.{layer}"
            before = x
            branch = self.attention(f"{name}.attention", self.norm(f"{name}.attention_norm", x), positions, documents)
            x = x + self.dropped(f"{name}.attention", branch)
            parallel = isinstance(self.config, GPTNeoXConfig) and self.config.use_parallel_residual
            branch = self.mlp(f"{name}.mlp", self.norm(f"{name}.mlp_norm", before if parallel else x))
            x = x + self.dropped(f"{name}.mlp", branch)
        head = "embedding.tokens.weight" if self.config.tie_word_embeddings else "head.weight"
        return self.norm("final_norm", x) @ self.w(head).T


def stage_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The global shape of every tensor of a model, as its modules declare it."""
    with torch.device("meta"):
        whole = Stage(config, range(config.num_hidden_layers), index=0, num_stages=1, group=TensorGroup())
    return {shard.spec.name: shard.spec.global_shape for placed in whole.placed_parameters for shard in placed.shards}
