"""The layers of GPT-2: LayerNorm, learned positions, multi-head attention, GELU in the tanh form, biases everywhere."""

from torch import nn

from megalite.model.builder import ModelBuilder
from megalite.model.embedding import Embedding
from megalite.model.families.gpt2.config import GPT2Config
from megalite.model.transformer import Attention, Block, GeluMLP


class GPT2Builder(ModelBuilder[GPT2Config]):
    """Builds GPT-2."""

    def embedding(self) -> Embedding:
        return Embedding(self.config, self.group, positions=self.config.max_position_embeddings)

    def norm(self) -> nn.Module:
        return nn.LayerNorm(self.config.hidden_size, eps=self.config.layer_norm_epsilon)

    def block(self, layer: int) -> nn.Module:
        attention = Attention(self.config, self.group, self.rows, rotary=None, bias=True, output_bias=True)
        return Block(self.norm(), attention, self.norm(), GeluMLP(self.config, self.group))
