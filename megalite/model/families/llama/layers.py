"""The layers of Llama: RMSNorm (arXiv:1910.07467), rotary grouped-query attention (arXiv:2305.13245), SwiGLU."""

from torch import nn

from megalite.model.builder import ModelBuilder
from megalite.model.families.llama.config import LlamaConfig
from megalite.model.transformer import Attention, Block, Rotary, SwiGLU
from megalite.parallel.tensor_group import TensorGroup


class LlamaBuilder(ModelBuilder[LlamaConfig]):
    """Builds Llama (arXiv:2307.09288); biases and a norm of queries and keys (Qwen3) as configured."""

    def __init__(self, config: LlamaConfig, group: TensorGroup, rows: int | None) -> None:
        super().__init__(config, group, rows)
        self.rotary = Rotary(config, config.rope_scaling)

    def norm(self) -> nn.Module:
        return nn.RMSNorm(self.config.hidden_size, eps=self.config.rms_norm_eps)

    def block(self, layer: int) -> nn.Module:
        config, group = self.config, self.group
        attention = Attention(
            *(config, group, self.rows),
            rotary=self.rotary,
            bias=config.attention_bias,
            output_bias=config.attention_output_bias,
            query_key_eps=config.rms_norm_eps if config.qk_norm else None,
        )
        return Block(self.norm(), attention, self.norm(), SwiGLU(config, group, bias=config.mlp_bias))
