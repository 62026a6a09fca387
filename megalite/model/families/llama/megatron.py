"""Llama in the options of Megatron."""

from megalite.model.formats.megatron import MegatronFormat, MegatronOptions, kind


def _section(options: MegatronOptions) -> dict[str, object]:
    if options.rotary_percent != 1.0:
        raise ValueError(
            f"rotary_percent={options.rotary_percent} with swiglu: llama turns whole heads; nothing stands in for it"
        )
    section: dict[str, object] = {
        "rms_norm_eps": options.norm_epsilon,
        "rope_theta": options.rope_theta,
        "attention_bias": bool(options.get("add_qkv_bias")),
    }
    if options.get("qk_layernorm"):
        section["qk_norm"] = True
    scaling = _rope_scaling(options)
    return section | ({"rope_scaling": scaling} if scaling else {})


def _rope_scaling(options: MegatronOptions) -> dict[str, object] | None:
    factor = options.get("rotary_seq_len_interpolation_factor")
    if options.get("use_rope_scaling"):
        # Megatron-core has these three as constants.
        bounds = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        return {"rope_type": "llama3", "factor": float(options.get("rope_scaling_factor", default=8.0))} | bounds
    return {"rope_type": "linear", "factor": float(factor)} if factor not in (None, 1) else None


MEGATRON = MegatronFormat(kind("RMSNorm", "rope", swiglu=True, bias=False), _section)
