"""The GPT-NeoX family, Pythia too."""

from megalite.model.families.gpt_neox.config import GPTNeoXConfig
from megalite.model.families.gpt_neox.huggingface import FORMAT
from megalite.model.families.gpt_neox.megatron import MEGATRON
from megalite.model.family import Family

FAMILY = Family(
    GPTNeoXConfig,
    builder="megalite.model.families.gpt_neox.layers:GPTNeoXBuilder",
    other_names=("gptneox", "pythia", "gptneoxforcausallm"),
    hugging_face=(FORMAT,),
    megatron=MEGATRON,
)
