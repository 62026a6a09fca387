"""The GPT-2 family."""

from megalite.model.families.gpt2.config import GPT2Config
from megalite.model.families.gpt2.huggingface import FORMAT
from megalite.model.families.gpt2.megatron import MEGATRON
from megalite.model.family import Family

FAMILY = Family(
    GPT2Config,
    builder="megalite.model.families.gpt2.layers:GPT2Builder",
    other_names=("gpt2lmheadmodel",),
    hugging_face=(FORMAT,),
    megatron=MEGATRON,
)
