"""The Llama family: Llama, Mistral, Qwen2, Qwen3."""

from megalite.model.families.llama.config import LlamaConfig
from megalite.model.families.llama.huggingface import FORMATS
from megalite.model.families.llama.megatron import MEGATRON
from megalite.model.family import Family

FAMILY = Family(
    LlamaConfig,
    builder="megalite.model.families.llama.layers:LlamaBuilder",
    other_names=(
        *("llama2", "llama3", "mistral", "qwen2", "qwen3"),
        *("llamaforcausallm", "mistralforcausallm", "qwen2forcausallm", "qwen3forcausallm"),
    ),
    hugging_face=FORMATS,
    megatron=MEGATRON,
)
