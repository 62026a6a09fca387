"""GPT-2 in the options of Megatron."""

from megalite.model.formats.megatron import MegatronFormat, MegatronOptions, kind


def _section(options: MegatronOptions) -> dict[str, object]:
    if not options.has_tanh_gelu:
        raise ValueError(
            "bias_gelu_fusion=False: its GELU is the exact one, and gpt2's is the tanh form; nothing stands in for it"
        )
    return {"layer_norm_epsilon": options.norm_epsilon}


MEGATRON = MegatronFormat(kind("LayerNorm", "learned_absolute", swiglu=False, bias=True), _section)
