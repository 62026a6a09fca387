"""A GPT with rotary positions in the options of Megatron, which has no parallel residual."""

from megalite.model.formats.megatron import MegatronFormat, MegatronOptions, kind


def _section(options: MegatronOptions) -> dict[str, object]:
    return {
        "layer_norm_eps": options.norm_epsilon,
        "rope_theta": options.rope_theta,
        "rotary_pct": options.rotary_percent,
        "use_parallel_residual": False,
        "hidden_act": "gelu_tanh" if options.has_tanh_gelu else "gelu",
    }


MEGATRON = MegatronFormat(kind("LayerNorm", "rope", swiglu=False, bias=True), _section)
