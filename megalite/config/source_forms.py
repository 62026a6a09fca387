"""Other ways of naming the data than the run file's list of sections, and the list that each of them means.

``corpus``, ``[a, b]``, ``{path: a}``, ``[0.3, a, 0.7, b]`` and ``{a: 0.3, b: 0.7}`` are offered as
``[{prefix: corpus}]`` and so on.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megalite.config.yaml12 import Dumper
from megalite.settings.validation import show

_DATASET = (".bin", ".idx")
_KEYS = ("prefix", "name", "weight")
_TEXTS = (".jsonl", ".json", ".parquet", ".gz", ".zst", ".arrow")
"""How files end that hold text and not tokens."""


def is_text(path: str | Path) -> bool:
    """Whether a file's name is that of a text to preprocess, rather than of a dataset or a file of weights."""
    return Path(path).suffix in _TEXTS


def require_list_of_sources(key: str, value: object, keys: str) -> None:
    """Raise ValueError, with the words that follow the key, where a value means sources in another form.

    `keys` are those of a source, for the message. A value that means nothing known is left to the validation.
    """
    meant = None if isinstance(value, list) and all(map(_is_source, value)) else _meant(value)
    if not meant:
        return
    text = f"={show(value)} is not a list of {{{keys}}}"
    if key == "data.train" and isinstance(value, str):
        text = f"={show(value)} is neither a file of weights and prefixes nor a list of {{{keys}}}"
    if texts := [source["prefix"] for source in meant if is_text(source["prefix"])]:
        stem = str(Path(texts[0]).with_suffix(""))
        made = f"first make a dataset with `megalite preprocess {texts[0]} --output {stem}`, then"
        meant = [{**source, "prefix": str(Path(source["prefix"]).with_suffix(""))} for source in meant]
        raise ValueError(f"{text}; {made} write {key}={_flow(meant)}")
    raise ValueError(f"{text}; write {key}={_flow(meant)}")


def _is_source(value: object) -> bool:
    if isinstance(value, Mapping):
        return "prefix" in value or "/" not in str(value.get("dataset", "/"))  # a path is meant as the prefix
    return not isinstance(value, str | int | float)


def _meant(value: object) -> list[dict[str, Any]]:
    """Return the sources that a value means, none where that is not clear."""
    if isinstance(value, str):
        return [_source(value)]
    if isinstance(value, Mapping):
        weights = [_number(weight) for weight in value.values()]
        if None not in weights and not value.keys() & _KEYS:
            return [_source(str(prefix), weight) for prefix, weight in zip(value, weights, strict=True)]
        return [one] if (one := _source_of(value)) else []
    if not isinstance(value, list):
        return []
    sources: list[dict[str, Any]] = []
    weight: float | None = None
    for item in value:
        if (number := _number(item)) is not None and weight is None:
            weight = number
            continue
        source = _source(item, weight) if isinstance(item, str) else _source_of(item)
        if source is None:
            return []
        sources.append(source)
        weight = None
    return [] if weight is not None else sources


def _source_of(value: object) -> dict[str, Any] | None:
    """Return a section with its only text as the prefix; None where there is no text, or more than one."""
    if not isinstance(value, Mapping):
        return None
    if "prefix" in value:
        return dict(value)
    texts = [text for key, text in value.items() if isinstance(text, str) and key not in _KEYS]
    kept = {key: value[key] for key in _KEYS if key in value}
    return _source(texts[0]) | kept if len(texts) == 1 else None


def _source(text: str, weight: float | None = None) -> dict[str, Any]:
    path = Path(text)
    prefix = str(path.with_suffix("")) if path.suffix in _DATASET else text
    return {"prefix": prefix} | ({} if weight is None else {"weight": weight})


def _number(item: object) -> float | None:
    if isinstance(item, int | float) and not isinstance(item, bool):
        return item
    try:
        return float(item) if isinstance(item, str) else None
    except ValueError:
        return None


def _flow(sources: list[dict[str, Any]]) -> str:
    """Return sources as YAML of one line."""
    written = yaml.dump(sources, Dumper=Dumper, default_flow_style=True, sort_keys=False, width=10**6)
    return written.strip()
