"""The options of the Megatron run that wrote a checkpoint, as the section `model` of a run file.

What changes the function that the weights compute and is not known to megalite is refused by its name.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml
from pydantic import ValidationError

from megalite.config import ModelConfig, read_model
from megalite.config.yaml12 import Loader
from megalite.errors import UserError
from megalite.model.formats.megatron import MegatronOptions
from megalite.model.registry import FAMILIES
from megalite.settings.validation import validation_lines

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


def model_section(args: Mapping[str, object], folder: Path) -> dict[str, object]:
    """Return the section `model` that a run's options come to, its vocabulary size only where they tell it unpadded.

    Raises UserError, with the names of the options, where they describe no model of megalite's.
    """
    options = MegatronOptions(args)
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
        reason = validation_lines(error, whole="model")[0]
        raise UserError(f"{folder}: its model is none of megalite's: {reason}; correct it in {MODEL_FILE}") from error


def _other_functions(options: MegatronOptions) -> Iterator[str]:
    for name in _OTHER_FUNCTIONS:
        value = options.get(name)
        if value not in _UNSET:
            yield f"{name}={value}"
    experts = options.get("num_experts", default=1)
    if any(count > 1 for count in (experts if isinstance(experts, list | tuple) else [experts])):
        yield f"num_experts={experts}"
    if options.get("softmax_type", default="vanilla") != "vanilla":
        yield f"softmax_type={options.get('softmax_type')}"


def _sizes(options: MegatronOptions) -> dict[str, object]:
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


def _vocabulary(options: MegatronOptions) -> int | None:
    told = options.get("true_vocab_size", "vocab_size")
    # The size that is given to this tokenizer leaves out its end of document.
    return told + 1 if told is not None and options.get("tokenizer_type") == "NullTokenizer" else told


def _family(options: MegatronOptions, folder: Path) -> dict[str, object]:
    rotary = options.get("position_embedding_type") == "rope" or bool(options.get("use_rotary_position_embeddings"))
    positions = "rope" if rotary else options.get("position_embedding_type", default="learned_absolute")
    kind = {
        "normalization": options.get("normalization", default="LayerNorm"),
        "position_embedding_type": positions,
        "swiglu": bool(options.get("swiglu")),
        "add_bias_linear": bool(options.get("add_bias_linear", default=not options.get("disable_bias_linear"))),
    }
    formats = {family.name: family.megatron for family in FAMILIES.values() if family.megatron is not None}
    for architecture, form in formats.items():
        if form.kind == kind:
            try:
                return {"architecture": architecture, **form.section(options)}
            except ValueError as error:
                raise UserError(f"{folder}: {error}") from error
    known = "; or ".join(_listed(form.kind) for form in formats.values())
    raise UserError(
        f"{folder}: {_listed(kind)}: no family of megalite's; those are {known}; if it is one of them all the same, "
        f"write the section model of a run file, architecture and all, as {folder / MODEL_FILE}"
    )


def _listed(kind: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in kind.items())
