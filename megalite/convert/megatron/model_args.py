"""The options of the Megatron run that wrote a checkpoint, as the section `model` of a run file.

What changes the function that the weights compute and is not known to megalite is refused by its name.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megalite.config import ModelConfig, read_model
from megalite.config.validation import validation_lines
from megalite.config.yaml12 import Loader
from megalite.errors import UserError

MODEL_FILE = "model.json"
"""A section `model` that a user puts beside a checkpoint. Whole, with its architecture, it stands in place of the
options; without, its keys stand before theirs."""

_MOST_BYTES = 1 << 20
_OTHER_FUNCTIONS = (
    "apply_residual_connection_post_layernorm",
    "attention_output_gate",
    "embed_layernorm",
    "experimental_attention_variant",
    "glu_activation",
    "is_hybrid_model",
    "mtp_num_layers",
    "multi_latent_attention",
    "no_rope_freq",
    "quick_geglu",
    "rotary_interleaved",
    "softmax_scale",
    "squared_relu",
    "window_size",
)
"""Options that give another function when they are set."""

_UNSET = (None, False, 0, "", [], ())


class _Options:
    """Options by name: those that an old release did not have yet have their default."""

    def __init__(self, args: Mapping[str, object]) -> None:
        self._args = args

    def get(self, *names: str, default: Any = None) -> Any:
        """Return the first of the options that is told and set."""
        return next((self._args[name] for name in names if self._args.get(name) is not None), default)

    def need(self, *names: str) -> Any:
        """Return the first of the options that is told; raise LookupError with its name where none is."""
        found = self.get(*names)
        if found is None:
            raise LookupError(names[0])
        return found


def model_section(args: Mapping[str, object], folder: Path) -> dict[str, object]:
    """Return the section `model` that a run's options come to, its vocabulary size only where they tell it unpadded.

    Raises UserError, with the names of the options, where they describe no model of megalite's.
    """
    options = _Options(args)
    found = list(_other_functions(options))
    if found:
        raise UserError(f"{folder}: {', '.join(found)}: a model that megalite has not; nothing stands in for it")
    try:
        return _sizes(options) | _family(options, folder)
    except LookupError as error:
        raise UserError(
            f"{folder}: its options lack {error.args[0]}; write the section model of a run file as "
            f"{folder / MODEL_FILE}"
        ) from error


def read_section(path: Path) -> dict[str, object]:
    """Read a section `model`, or that of a run file, as JSON or YAML; raise UserError where it is none."""
    try:
        with path.open("rb") as file:
            document = yaml.load(file.read(_MOST_BYTES), Loader)  # noqa: S506 (a SafeLoader)
    except (OSError, yaml.YAMLError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read: {error}; write the section model of a run file, or the file"
        ) from error
    section = document.get("model", document) if isinstance(document, dict) else document
    if not isinstance(section, dict):
        raise UserError(f"{path}: holds no section model; write one, as a run file has it")
    return section


def build_model(section: Mapping[str, object], folder: Path) -> ModelConfig:
    """Return the model that a section describes; raise UserError where it describes none."""
    try:
        return read_model(section)
    except ValidationError as error:
        reason = validation_lines(error, below=1, whole="model")[0]
        raise UserError(f"{folder}: its model is none of megalite's: {reason}; correct it in {MODEL_FILE}") from error


def _other_functions(options: _Options) -> Iterator[str]:
    for name in _OTHER_FUNCTIONS:
        value = options.get(name)
        if value not in _UNSET:
            yield f"{name}={value}"
    experts = options.get("num_experts", default=1)
    if any(count > 1 for count in (experts if isinstance(experts, list | tuple) else [experts])):
        yield f"num_experts={experts}"
    if options.get("softmax_type", default="vanilla") != "vanilla":
        yield f"softmax_type={options.get('softmax_type')}"


def _sizes(options: _Options) -> dict[str, object]:
    heads = options.need("num_attention_heads")
    groups = options.get("num_query_groups") if options.get("group_query_attention") else None
    section = {
        "hidden_size": options.need("hidden_size"),
        "num_hidden_layers": options.need("num_layers", "encoder_num_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": groups or options.get("num_key_value_heads", default=heads),
        "head_dim": options.get("kv_channels"),
        "intermediate_size": options.get("ffn_hidden_size", default=4 * options.need("hidden_size")),
        "max_position_embeddings": options.need("max_position_embeddings", "seq_length"),
        "tie_word_embeddings": not options.get("untie_embeddings_and_output_weights", default=False),
        "initializer_range": options.get("init_method_std"),
        "vocab_size": _vocabulary(options),
    }
    return {key: value for key, value in section.items() if value is not None}


def _vocabulary(options: _Options) -> int | None:
    told = options.get("true_vocab_size", "vocab_size")
    # The size that is given to this tokenizer leaves out its end of document.
    return told + 1 if told is not None and options.get("tokenizer_type") == "NullTokenizer" else told


def _family(options: _Options, folder: Path) -> dict[str, object]:
    rotary = options.get("position_embedding_type") == "rope" or bool(options.get("use_rotary_position_embeddings"))
    positions = "rope" if rotary else options.get("position_embedding_type", default="learned_absolute")
    kind = {
        "normalization": options.get("normalization", default="LayerNorm"),
        "position_embedding_type": positions,
        "swiglu": bool(options.get("swiglu")),
        "add_bias_linear": bool(options.get("add_bias_linear", default=not options.get("disable_bias_linear"))),
    }
    epsilon = options.get("norm_epsilon", "layernorm_epsilon", default=1e-5)
    if kind == _LLAMA:
        return {"architecture": "llama", "rms_norm_eps": epsilon} | _llama(options, folder)
    if kind == _GPT2:
        _require_tanh(options, folder)
        return {"architecture": "gpt2", "layer_norm_epsilon": epsilon}
    if kind == _ROTARY_GPT:
        return {"architecture": "gpt_neox", "layer_norm_eps": epsilon} | _rotary_gpt(options)
    told = ", ".join(f"{name}={value}" for name, value in kind.items())
    families = "; or ".join(", ".join(f"{n}={v}" for n, v in family.items()) for family in (_LLAMA, _GPT2, _ROTARY_GPT))
    raise UserError(
        f"{folder}: {told}: no family of megalite's; those are {families}; if it is one of them all the same, write "
        f"the section model of a run file, architecture and all, as {folder / MODEL_FILE}"
    )


def _kind(normalization: str, positions: str, *, swiglu: bool, bias: bool) -> dict[str, object]:
    return {
        "normalization": normalization,
        "position_embedding_type": positions,
        "swiglu": swiglu,
        "add_bias_linear": bias,
    }


_LLAMA = _kind("RMSNorm", "rope", swiglu=True, bias=False)
_GPT2 = _kind("LayerNorm", "learned_absolute", swiglu=False, bias=True)
_ROTARY_GPT = _kind("LayerNorm", "rope", swiglu=False, bias=True)


def _llama(options: _Options, folder: Path) -> dict[str, object]:
    percent = _rotary_percent(options)
    if percent != 1.0:
        raise UserError(
            f"{folder}: rotary_percent={percent} with swiglu: llama turns whole heads; nothing stands in for it"
        )
    section: dict[str, object] = {
        "rope_theta": float(options.get("rotary_base", default=10000)),
        "attention_bias": bool(options.get("add_qkv_bias")),
    }
    if options.get("qk_layernorm"):
        section["qk_norm"] = True
    scaling = _rope_scaling(options)
    return section | ({"rope_scaling": scaling} if scaling else {})


def _rope_scaling(options: _Options) -> dict[str, object] | None:
    factor = options.get("rotary_seq_len_interpolation_factor")
    if options.get("use_rope_scaling"):
        # Megatron-core has these three as constants.
        bounds = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        return {"rope_type": "llama3", "factor": float(options.get("rope_scaling_factor", default=8.0))} | bounds
    return {"rope_type": "linear", "factor": float(factor)} if factor not in (None, 1) else None


def _rotary_gpt(options: _Options) -> dict[str, object]:
    return {
        "rope_theta": float(options.get("rotary_base", default=10000)),
        "rotary_pct": _rotary_percent(options),
        "use_parallel_residual": False,
        "hidden_act": "gelu_tanh" if _is_tanh(options) else "gelu",
    }


def _rotary_percent(options: _Options) -> float:
    return float(options.get("rotary_percent", default=1.0))


def _is_tanh(options: _Options) -> bool:
    """Megatron's GELU fused with the bias is the tanh form, and so is --openai-gelu; the plain one is exact."""
    return bool(options.get("openai_gelu") or options.get("bias_gelu_fusion", default=True))


def _require_tanh(options: _Options, folder: Path) -> None:
    if not _is_tanh(options):
        raise UserError(
            f"{folder}: bias_gelu_fusion=False: its GELU is the exact one, and gpt2's is the tanh form; nothing "
            "stands in for it"
        )
