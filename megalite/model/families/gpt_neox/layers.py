"""The layers of GPT-NeoX: LayerNorm, attention whose heads rotate in part, GELU; attention and MLP may be parallel."""

from torch import nn

from megalite.model.builder import ModelBuilder
from megalite.model.families.gpt_neox.config import GPTNeoXConfig
from megalite.model.transformer import Attention, Block, GeluMLP, Rotary
from megalite.parallel.tensor_group import TensorGroup


class GPTNeoXBuilder(ModelBuilder[GPTNeoXConfig]):
    """Builds GPT-NeoX (arXiv:2204.06745)."""

    def __init__(self, config: GPTNeoXConfig, group: TensorGroup, rows: int | None) -> None:
        super().__init__(config, group, rows)
        self.rotary = Rotary(config)

    def norm(self) -> nn.Module:
        return nn.LayerNorm(self.config.hidden_size, eps=self.config.layer_norm_eps)

    def block(self, layer: int) -> nn.Module:
        config, group, bias = self.config, self.group, self.config.attention_bias
        attention = Attention(config, group, self.rows, rotary=self.rotary, bias=bias, output_bias=bias)
        mlp = GeluMLP(config, group, exact=config.hidden_act == "gelu")
        return Block(self.norm(), attention, self.norm(), mlp, parallel=config.use_parallel_residual)
