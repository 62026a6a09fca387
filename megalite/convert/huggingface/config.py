"""``config.json`` into our section `model` and back; what it asks beyond that is refused by name."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megalite.checkpoint.safetensors_file import ENCODINGS
from megalite.config import ModelConfig, read_model
from megalite.convert.huggingface.rope import ROPE_KEYS, rotary_of, written_rotary
from megalite.errors import UserError, nearest
from megalite.model.formats.hugging_face import REQUIRED, HuggingFaceFormat, Setting
from megalite.model.registry import FAMILIES, family_of
from megalite.settings.validation import alternatives, show, validation_lines

CONFIG = "config.json"

INERT = frozenset(
    {
        *("architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "use_cache", "max_length"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id"),
        *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout"),
        *("pretraining_tp", "task_specific_params", "gradient_checkpointing", "is_decoder", "is_encoder_decoder"),
        *("output_attentions", "output_hidden_states", "output_past", "return_dict", "id2label", "label2id"),
        *("problem_type", "finetuning_task", "num_labels", "tokenizer_class", "attn_implementation", "n_ctx"),
        *("chunk_size_feed_forward", "do_sample", "temperature", "top_k", "top_p", "unsloth_version", "unsloth_fixed"),
    }
)
"""Keys that change nothing of the function, nor do those that begin as in `INERT_PREFIXES`."""
INERT_PREFIXES = ("_", "summary_")

DEFAULT_WINDOW = 4096
DEFAULT_WINDOW_LAYERS = 28
"""Of classes with a window, where a ``config.json`` has no other."""
_WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


def model_of(
    config: Mapping[str, Any], path: Path, max_positions: int | None = None
) -> tuple[HuggingFaceFormat, ModelConfig]:
    """Return the format and the model that a ``config.json`` describes.

    `max_positions` takes the place of the longest sequence that it allows, where that is longer. Raises UserError for
    a family that is not known, code of its own, and all that this package's models do not compute.
    """
    architecture, form = _format(config, path)
    given: dict[str, Any] = {"architecture": architecture, **dict.fromkeys(form.flags, True)}
    for setting in form.settings:
        value = _ours(setting, config, path)
        if value is not None:
            given[setting.ours] = value
    if form.rotary:
        given |= rotary_of(form, config, path)
    try:
        model = read_model(given)
    except ValidationError as error:
        raise UserError(
            f"{path}: describes no model that megalite knows: {validation_lines(error, whole='')[0]}"
        ) from error
    if max_positions is not None:
        longest = model.max_position_embeddings
        if max_positions > longest or not form.rotary:
            reason = "" if form.rotary else ", and each has weights"
            raise UserError(
                f"--max-positions={max_positions}: {path} has max_position_embeddings={longest}{reason}; leave it out"
            )
        model = read_model({**given, "max_position_embeddings": max_positions})
    _require_full_attention(form, config, model.max_position_embeddings, path)
    _require_known(form, config, path)
    return form, model


def notes_on(form: HuggingFaceFormat, model: ModelConfig, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return which keys of a window in a ``config.json`` are not kept, as all layers attend to all tokens before."""
    written = _written_window(form, model)
    found = [key for key in _WINDOW_KEYS if config.get(key) and config[key] != written.get(key)]
    return (f"not kept of {CONFIG}, as the model computes the same without: {', '.join(found)}",) if found else ()


def config_of(
    model: ModelConfig, precision: str, token_ids: Mapping[str, Any]
) -> tuple[HuggingFaceFormat, dict[str, Any]]:
    """Return the format that a model of ours is written as, and its ``config.json``.

    `token_ids` go in as they are. Raises UserError for a model that no family's class computes.
    """
    ours = model.model_dump(mode="json")
    forms = family_of(model).hugging_face
    on = {flag for one in forms for flag in one.all_flags if ours.get(flag)}
    form = next((one for one in forms if one.has(on)), None)
    if form is None:
        flags = f" has {' and '.join(f'{flag}=true' for flag in sorted(on))} and none of the other biases and norms"
        raise UserError(
            f"model: no family of Hugging Face{flags if forms else f' is known for {model.architecture}'}; this model "
            "can be trained and generated from, but not written as theirs"
        )
    _require_dividing_heads(form, model)
    written: dict[str, Any] = {"architectures": [form.causal_class], "model_type": form.model_type}
    written |= {setting.theirs: _theirs(setting, ours[setting.ours]) for setting in form.settings}
    written |= {fixed.theirs: fixed.allowed[0] for fixed in form.fixed}
    if form.rotary:
        written |= written_rotary(form, ours)
    written |= _written_window(form, model)
    return form, {**written, **token_ids, "dtype": ENCODINGS[precision].torch_name, "use_cache": True}


def _written_window(form: HuggingFaceFormat, model: ModelConfig) -> dict[str, Any]:
    """Return the keys that say that every layer attends to all tokens before, of a class that has such keys."""
    layers = model.num_hidden_layers
    values = (None, False, layers, ["full_attention"] * layers)
    return dict(zip(_WINDOW_KEYS, values, strict=True)) if form.names_window else {}


def _require_dividing_heads(form: HuggingFaceFormat, model: ModelConfig) -> None:
    hidden, heads, width = model.hidden_size, model.num_attention_heads, model.head_dim
    has_width = any(setting.theirs == "head_dim" for setting in form.settings)
    if (hidden % heads and form.heads_divide) or (width * heads != hidden and not has_width):
        raise UserError(
            f"model.head_dim={width}: transformers' {form.causal_class} takes only models whose "
            f"num_attention_heads={heads} divides hidden_size={hidden}{'' if has_width else ', which gives head_dim'}; "
            "this model can be trained and generated from, but not written as theirs"
        )


def _format(config: Mapping[str, Any], path: Path) -> tuple[str, HuggingFaceFormat]:
    """Return the architecture of ours that a ``config.json`` is of, and its format."""
    name = config.get("model_type")
    if config.get("auto_map"):
        raise UserError(
            f"{path}: auto_map names code of the folder's own, which is never run; if the model is a plain {name}, "
            "delete the key"
        )
    known = {one.model_type: (family.name, one) for family in FAMILIES.values() for one in family.hugging_face}
    if name not in known:
        fix = nearest(str(name), known)
        raise UserError(f"{path}: model_type={show(name)} is none of the families that are converted{fix}")
    return known[name]


def _ours(setting: Setting, config: Mapping[str, Any], path: Path) -> Any:
    value = config.get(setting.theirs)
    if value is None:
        value = setting.default
    if value is REQUIRED:
        raise UserError(f"{path}: {setting.theirs} is missing; give it as the model was trained")
    if setting.words is None:
        return value
    if not isinstance(value, str) or value not in setting.words:
        allowed = alternatives(setting.words)
        raise UserError(f"{path}: {setting.theirs}={show(value)} is not what megalite computes; it can be {allowed}")
    return setting.words[value]


def _theirs(setting: Setting, value: object) -> object:
    if setting.words is None:
        return value
    return next(word for word, ours in setting.words.items() if ours == value)


def _require_full_attention(form: HuggingFaceFormat, config: Mapping[str, Any], positions: int, path: Path) -> None:
    """Refuse a window that is shorter than the sequences: within it, attention is the same with and without."""
    window = config.get("sliding_window", DEFAULT_WINDOW)
    if not _has_window(form, config, path) or window is None:
        return
    if type(window) is not int:
        raise UserError(f"{path}: sliding_window={show(window)} is no number of tokens; write one, or null for none")
    if window < positions:
        raise UserError(
            f"{path}: sliding_window={window} is below max_position_embeddings={positions}, and megalite attends to "
            f"all tokens before; up to {window} both are the same: convert with --max-positions {window}"
        )


def _has_window(form: HuggingFaceFormat, config: Mapping[str, Any], path: Path) -> bool:
    """Tell whether some layer attends within a window."""
    layers = config.get("layer_types")
    if layers is not None:
        kinds = layers if isinstance(layers, list) else [layers]
        strange = sorted({str(layer) for layer in kinds} - {"full_attention", "sliding_attention"})
        if strange:
            raise UserError(f"{path}: layer_types has {strange[0]!r}; every layer can be 'full_attention'")
        if not form.always_slides:
            return "sliding_attention" in kinds
    if form.always_slides or not config.get("use_sliding_window"):
        return form.always_slides
    # Layers below this number attend to all tokens whatever the window is.
    below = config.get("max_window_layers")
    if below is not None and type(below) is not int:
        raise UserError(f"{path}: max_window_layers={show(below)} is no number of layers; write one")
    return (DEFAULT_WINDOW_LAYERS if below is None else below) < config["num_hidden_layers"]


def _require_known(form: HuggingFaceFormat, config: Mapping[str, Any], path: Path) -> None:
    for fixed in form.fixed:
        value = config.get(fixed.theirs)
        if value is not None and value not in fixed.allowed:
            raise UserError(
                f"{path}: {fixed.theirs}={show(value)} is not what megalite computes: {fixed.reason}; it can be "
                f"{alternatives(fixed.allowed)}"
            )
    for key in _unknown(form, config):
        raise UserError(
            f"{path}: {key}={show(config[key])} is not known of a {form.model_type}; if the model computes the same "
            "without it, delete the key"
        )


def _unknown(form: HuggingFaceFormat, config: Mapping[str, Any]) -> Iterator[str]:
    known = {*(one.theirs for one in (*form.settings, *form.fixed)), *INERT, *form.inert, *_WINDOW_KEYS}
    if form.rotary:
        known |= {*ROPE_KEYS}
    for key, value in config.items():
        if value and key not in known and not key.startswith(INERT_PREFIXES):
            yield key
