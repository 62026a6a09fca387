"""Read a DeepSpeed JSON against the table: what is honoured, what is wrong, and what the user should hear."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megalite.config.deepspeed.rules import ByType, Derived, Honoured, Off, Precision, Refused, Rule, Unused
from megalite.config.deepspeed.table import RECOMPUTE_KEYS, TABLE
from megalite.config.text_file import read_text
from megalite.errors import UserError, nearest
from megalite.settings.validation import Fault, Key, alternatives, show
from megalite.settings.values import TEXT


class _Reader:
    """Walks a document beside the table, keeps what is honoured or stated, and collects the faults and the notes."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.notes: list[Fault] = []

    def fault(self, key: Key, text: str) -> None:
        self.faults.append(Fault(key, text))

    def clean(self, *sections: str) -> bool:
        """No fault stands in these sections, so what they say together can be judged."""
        return not any(fault.key[0] in sections for fault in self.faults)

    def section(self, rules: Mapping[str, Any], data: object, at: Key) -> dict[str, Any]:
        """Return the section's honoured and stated keys, each in its own type."""
        if not isinstance(data, Mapping):
            self.fault(at, f"={show(data)} is not a section; write {{{_usable(rules)[0]}: ...}}")
            return {}
        kept: dict[str, Any] = {}
        for name, value in data.items():
            key = (*at, name)
            if name not in rules:
                self.fault(key, f" is not a key{_nearest_key(name, rules)}")
            elif value is not None and (read := self.value(rules[name], value, key)) is not None:
                kept[name] = read
        return kept

    def value(self, rule: Rule, value: Any, key: Key) -> Any:
        """Return what the document keeps of one value, None where that is nothing."""
        match rule:
            case Mapping():
                return self.section(rule, value, key) or None
            case ByType():
                return self.by_type(rule, value, key)
            case Off():
                return self.off(rule, value, key)
            case Refused():
                return self.refused(rule, value, key)
            case Unused():
                return self.unused(rule, value, key)
            case Honoured() if value == "auto":
                return self.auto(rule, key)
            case Derived() if value == "auto":
                return None
        try:
            return rule.kind.read(value)
        except ValueError as error:
            self.fault(key, str(error))
            return None

    def auto(self, rule: Honoured, key: Key) -> str | None:
        if rule.auto == "refused":
            self.fault(key, f"='auto' has nothing to follow; write {rule.kind.words}")
        return "auto" if rule.auto == "resolved" else None

    def refused(self, rule: Refused, value: Any, key: Key) -> None:
        if value not in (*rule.harmless, "auto"):
            shown = "" if isinstance(value, Mapping) else f"={show(value)}"
            self.fault(key, f"{shown} is refused: {rule.reason}; {rule.instead}")

    def unused(self, rule: Unused, value: Any, key: Key) -> None:
        try:
            read = value if value == "auto" else rule.kind.read(value)
        except ValueError as error:
            self.fault(key, str(error))
            return
        if read not in (*rule.quiet, "auto"):
            self.notes.append(Fault(key, f"={show(value)} is not used: {rule.reason}"))

    def off(self, rule: Off, value: Any, key: Key) -> None:
        if not isinstance(value, Mapping):
            self.refused(Refused(rule.reason, rule.instead, (False,)), value, key)
        elif self.known(rule.keys, value, key):
            self.refused(Refused(rule.reason, rule.instead, rule.off), value.get(rule.switch), (*key, rule.switch))

    def known(self, keys: Mapping[str, Any], data: Mapping[str, Any], at: Key) -> bool:
        """Check the names of a section that is left out, and of those within it."""
        before = len(self.faults)
        for name, value in data.items():
            if name not in keys:
                self.fault((*at, name), f" is not a key{nearest(name, keys)}")
            elif isinstance(keys[name], Mapping) and isinstance(value, Mapping):
                self.known(keys[name], value, (*at, name))
        return len(self.faults) == before

    def by_type(self, rule: ByType, value: Any, key: Key) -> dict[str, Any]:
        given = value.get("type") if isinstance(value, Mapping) else None
        name = {name.lower(): name for name in rule.params}.get(str(given).lower(), "")
        if isinstance(value, Mapping) and not name:
            refused = {name.lower(): why for name, why in rule.refused.items()}.get(str(given).lower())
            if refused is not None:
                self.refused(refused, given, (*key, "type"))
            else:
                words = " is missing; write " if given is None else f"={show(given)} is not "
                self.fault((*key, "type"), words + alternatives(rule.params))
            # Without a type no parameter can be judged.
            value = {other: item for other, item in value.items() if other not in ("type", "params")}
        rules = {"type": Honoured(TEXT), "params": rule.params.get(name, {}), **rule.others}
        kept = {"params": {}, **self.section(rules, value, key), "type": name}
        for parameter in rule.required.get(name, ()):
            if parameter not in (value.get("params") or {}):
                self.fault((*key, "params", parameter), _missing(rule.params[name][parameter]))
        return kept


def _missing(rule: Honoured) -> str:
    return f" is missing; write {rule.kind.words}" + (", or 'auto'" if rule.auto == "resolved" else "")


def _usable(rules: Mapping[str, Rule]) -> list[str]:
    return [name for name, rule in rules.items() if not isinstance(rule, Refused | Off | Unused)]


def _nearest_key(name: str, rules: Mapping[str, Rule]) -> str:
    close = nearest(name, rules)
    return close if close.startswith("; did you mean") else nearest(name, _usable(rules))


class Reading(NamedTuple):
    """What became of a JSON: the document in megalite's terms, what is wrong with it, and what the user should hear.

    A note is a `Fault` that ends nothing.
    """

    document: dict[str, Any]
    faults: list[Fault]
    notes: list[Fault]


_SECOND_NAMES = {
    name: f"stage3_{name}"
    for name in (
        "prefetch_bucket_size",
        "param_persistence_threshold",
        "model_persistence_threshold",
        "max_live_parameters",
        "max_reuse_distance",
        "gather_16bit_weights_on_model_save",
        "module_granularity_threshold",
        "use_all_reduce_for_fetch_params",
        "allgather_sequential",
    )
}
"""Names of ZeRO's keys that DeepSpeed takes as well, with those that it documents."""


def read_document(data: Mapping[str, Any], precision: Precision | None = None, run_file: str = "run.yaml") -> Reading:
    """Return the JSON in megalite's terms, every fault in it, and what of it is taken otherwise than it is written.

    The document keeps the honoured and stated keys only. `precision` is ``train.precision`` of `run_file`, None where
    that is not given: ``enabled: auto`` of bf16 and fp16 follows it, and a stated ``enabled`` must agree. Where nothing
    but "auto" asks, it is bf16, or fp16 where bf16 is ruled out. "auto" stays where `resolve_auto` computes it.
    """
    reader = _Reader()
    data = dict(data)
    if "bfloat16" in data:
        if "bf16" in data:
            reader.fault(("bfloat16",), " stands beside bf16, its newer name; keep bf16")
        data.setdefault("bf16", data.pop("bfloat16"))
    data = _first_names(data, reader)
    document = reader.section(TABLE, data, ())
    if reader.clean("bf16", "fp16"):
        reader.faults.extend(_precision_faults(document, precision, run_file))
    if reader.clean("bf16", "fp16"):
        chosen = _choose_precision(document, precision, reader)
        if chosen != "fp32" and reader.clean("zero_optimization"):
            _leave_stage_0(document, chosen, reader)
        if reader.clean("data_types"):
            reader.faults.extend(_accumulation_faults(document, chosen))
    if reader.clean("zero_optimization"):
        reader.faults.extend(_zero_faults(document))
    if reader.clean("activation_checkpointing", "pipeline"):
        reader.faults.extend(_recompute_faults(document))
    return Reading(_normalised(document), reader.faults, reader.notes)


def _first_names(data: dict[str, Any], reader: _Reader) -> dict[str, Any]:
    """Return the JSON with ZeRO's keys under the names that DeepSpeed documents."""
    zero = data.get("zero_optimization")
    if not isinstance(zero, Mapping):
        return data
    renamed: dict[str, Any] = {}
    for name, value in zero.items():
        first = _SECOND_NAMES.get(name) or name
        if first != name and first in zero:
            reader.fault(("zero_optimization", name), f" stands beside {first}, another name for it; keep {first}")
        else:
            renamed[first] = value
    return {**data, "zero_optimization": renamed}


def _precision_faults(document: Mapping[str, Any], precision: Precision | None, run_file: str) -> Iterator[Fault]:
    enabled = {name: document.get(name, {}).get("enabled") for name in ("bf16", "fp16")}
    if enabled["bf16"] is True and enabled["fp16"] is True:
        yield Fault(("fp16", "enabled"), "=true stands beside bf16.enabled=true; keep one of them")
    elif precision is not None:
        for name, value in enabled.items():
            if isinstance(value, bool) and value != (name == precision) and (value or name == precision):
                text = f"={show(value)} disagrees with train.precision={show(precision)} of {run_file}"
                yield Fault((name, "enabled"), f"{text}; write 'auto' or {show(not value)} here, or change the other")


def _choose_precision(document: dict[str, Any], precision: Precision | None, reader: _Reader) -> Precision:
    """Write the run's precision out in the document, in the place of "auto", and return it."""
    switches: tuple[Precision, Precision] = ("bf16", "fp16")
    enabled: dict[Precision, Any] = {name: document.get(name, {}).get("enabled") for name in switches}
    chosen: Precision | None = precision or next((name for name, value in enabled.items() if value is True), None)
    if chosen is None:
        asking = [name for name, value in enabled.items() if value == "auto"]
        chosen = "fp32"
        if asking:
            chosen = "fp16" if enabled["bf16"] is False else "bf16"
            text = f"='auto' is taken for {chosen}, since train.precision is not given; write fp32, bf16 or fp16 there"
            reader.notes.append(Fault((asking[0], "enabled"), text))
    for name in enabled:
        if name == chosen:
            document.setdefault(name, {})["enabled"] = True
        elif enabled[name] == "auto":
            del document[name]["enabled"]
            if not document[name]:
                del document[name]
    return chosen


def _leave_stage_0(document: dict[str, Any], precision: Precision, reader: _Reader) -> None:
    """Have stage 1 in the place of stage 0, and say so.

    At stage 0 DeepSpeed has no optimizer with fp32 master weights that reduces gradients once a step and takes their
    norm over a pipeline. Stage 1 is the same training: it only divides the optimizer's state among the replicas.
    """
    zero = document.get("zero_optimization", {})
    if zero.get("stage", 0) == 0:
        was = "=0" if "stage" in zero else " is not given, which is stage 0, and"
        document["zero_optimization"] = {**zero, "stage": 1}
        text = f"{was} runs as stage 1: in {precision} the fp32 master weights are ZeRO's. The training is the same; "
        text += "the replicas share the optimizer's state"
        reader.notes.append(Fault(("zero_optimization", "stage"), text))


def _accumulation_faults(document: Mapping[str, Any], precision: Precision) -> Iterator[Fault]:
    stated = document.get("data_types", {}).get("grad_accum_dtype", "fp32")
    if stated not in ("fp32", precision):
        allowed = alternatives(dict.fromkeys(("fp32", precision)))
        text = f"='{stated}' does not go with parameters in {precision}; write {allowed}"
        yield Fault(("data_types", "grad_accum_dtype"), text)


def _zero_faults(document: Mapping[str, Any]) -> Iterator[Fault]:
    zero = document.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    for name, cpu_stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        if name in zero:
            for fault in _offload_faults(zero[name], stage, cpu_stages):
                yield Fault(("zero_optimization", name, *fault.key), fault.text)
    for name, off in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
        if stage > 0 and document.get(name, off) != off:
            text = f"={show(document[name])} is not taken by DeepSpeed at ZeRO stage {stage}; write {show(off)}"
            yield Fault((name,), text)


def _recompute_faults(document: Mapping[str, Any]) -> Iterator[Fault]:
    number = document.get("activation_checkpointing", {}).get("number_checkpoints")
    interval = document.get("pipeline", {}).get("activation_checkpoint_interval")
    if number and interval:
        text = f"={interval} stands beside activation_checkpointing.number_checkpoints={number}; keep one of them"
        yield Fault(("pipeline", "activation_checkpoint_interval"), text)


def _offload_faults(offload: Mapping[str, Any], stage: int, cpu_stages: tuple[int, ...]) -> Iterator[Fault]:
    device = offload.get("device")
    stages = (3,) if device == "nvme" else cpu_stages
    if device is None:
        # DeepSpeed takes a missing device for 'none', and trains without the offload that was asked for.
        yield Fault(("device",), " is missing; write 'cpu', 'nvme' or 'none'")
    elif device != "none" and stage not in stages:
        yield Fault(
            ("device",), f"={show(device)} does not go with ZeRO stage {stage}; use stage {alternatives(stages)}"
        )
    if device == "nvme" and "nvme_path" not in offload:
        yield Fault(("nvme_path",), " is missing; write the folder on the NVMe device")


def _normalised(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document without what asks for nothing."""
    zero = document.get("zero_optimization", {})
    for name in ("offload_optimizer", "offload_param"):
        if zero.get(name, {}).get("device") == "none":
            del zero[name]
    for name, keys in RECOMPUTE_KEYS.items():
        for key in keys:
            if not document.get(name, {}).get(key, True):
                del document[name][key]
        if document.get(name) == {}:
            del document[name]
    if optimizer := document.get("optimizer"):
        kind = "AdamW" if optimizer["type"] == "Adam" else optimizer["type"]
        document["optimizer"] = {"type": kind, "params": optimizer["params"]}
    return document


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's mapping.

    Raises UserError where the file is missing or is no JSON object, and where a key stands twice, of which DeepSpeed
    and Python's json would keep the last in silence.
    """
    try:
        document = json.loads(read_text(path), object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise UserError(f"{path.name}: line {error.lineno}, column {error.colno}: no JSON: {error.msg}") from None
    except ValueError as error:
        raise UserError(f"{path.name}: {error}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path.name}: the file holds {show(document)}; write a JSON object")
    return document


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    section: dict[str, Any] = {}
    for name, value in pairs:
        if name in section:
            raise ValueError(f"{name} stands twice in one section; keep one")
        section[name] = value
    return section
