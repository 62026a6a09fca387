"""Rotary positions in a ``config.json``: the keys of transformers 5, and those of the versions before."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalite.errors import UserError, nearest
from megalite.model.formats.hugging_face import HuggingFaceFormat
from megalite.settings.validation import alternatives, show

_ORIGINAL = "original_max_position_embeddings"
ROPE_KEYS = (
    *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "rotary_pct", "rotary_emb_base"),
    _ORIGINAL,
)

_DEFAULT_THETA = 10000.0
_SCALING_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
}


def rotary_of(form: HuggingFaceFormat, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the settings of rotary positions in our section `model`; raise UserError for those that it lacks."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given = config.get(name) or {}
    if not isinstance(given, Mapping):
        raise UserError(f"{path}: {name}={show(given)} is no mapping; give rope_type and what belongs to it")
    rope = dict(given)
    older = "rotary_emb_base" if form.partial_rotary is not None else "rope_theta"
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or config.get(older) or _DEFAULT_THETA
    kind = str(rope.pop("rope_type", None) or rope.get("type", "default"))
    rope.pop("type", None)
    ours: dict[str, Any] = {"rope_theta": theta}
    turning = _turning_share(form, config, rope, path)
    if turning is not None:
        ours["rotary_pct"] = turning
    if kind == "default":
        return ours
    if kind not in _SCALING_KEYS or form.partial_rotary is not None:
        allowed = ("default", *(_SCALING_KEYS if form.partial_rotary is None else ()))
        raise UserError(
            f"{path}: {name}.rope_type={kind!r} is not what megalite computes for {form.model_type}; it can be "
            f"{alternatives(allowed)}"
        )
    if kind == "llama3":
        outside = config.get(_ORIGINAL)
        rope[_ORIGINAL] = outside or rope.get(_ORIGINAL) or config["max_position_embeddings"]
    keys = _SCALING_KEYS[kind]
    for key in keys:
        if key not in rope:
            raise UserError(f"{path}: {name}.{key} is missing; rope_type={kind!r} needs it")
    if strange := sorted(set(rope) - set(keys)):
        raise UserError(f"{path}: {name}.{strange[0]} is no setting of rope_type={kind!r}{nearest(strange[0], keys)}")
    ours["rope_scaling"] = {"rope_type": kind, **{key: rope[key] for key in keys}}
    return ours


def _turning_share(form: HuggingFaceFormat, config: Mapping[str, Any], rope: dict[str, Any], path: Path) -> object:
    told = [rope.pop("partial_rotary_factor", None), config.get("partial_rotary_factor"), config.get("rotary_pct")]
    share = next((one for one in told if one is not None), form.partial_rotary)
    if form.partial_rotary is None and share not in (None, 1.0):
        raise UserError(
            f"{path}: partial_rotary_factor={show(share)} is not what megalite computes for {form.model_type}: all "
            "dims of a head turn"
        )
    return None if form.partial_rotary is None else share


def written_rotary(form: HuggingFaceFormat, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that say the same in transformers 5, and beside them those for 4."""
    theta, scaling = ours["rope_theta"], ours.get("rope_scaling")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        rope = {key: scaling[key] for key in ("rope_type", *_SCALING_KEYS[scaling["rope_type"]])}
        return {"rope_theta": theta, "rope_scaling": rope, "rope_parameters": {**rope, "rope_theta": theta}}
    if form.partial_rotary is None:
        return {"rope_theta": theta, "rope_parameters": rope}
    share = ours["rotary_pct"]
    older = {"rotary_emb_base": theta, "rotary_pct": share}
    return {**older, "rope_parameters": {**rope, "partial_rotary_factor": share}}
