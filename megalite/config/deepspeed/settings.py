"""The settings that a DeepSpeed JSON comes to: checked, completed from the run, as the engine takes them."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from megalite.config.deepspeed.parse import read_document
from megalite.config.deepspeed.rules import Derived, Precision
from megalite.config.deepspeed.table import RECOMPUTE_KEYS, SCHEDULERS, TABLE
from megalite.optim.registry import declaration_of_type
from megalite.paths import escape
from megalite.settings.validation import Fault, Origin, report


@dataclass(frozen=True, slots=True)
class DeepSpeedSettings:
    """What the DeepSpeed JSON says, checked; made by `parse`."""

    document: Mapping[str, Any] = field(default_factory=dict)
    """Honoured and stated keys, in plain JSON; an empty document is fp32 at ZeRO stage 0."""
    origin: Origin = Origin(section=("deepspeed",))
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What of the JSON is taken otherwise than it is written, or not at all; a line each, for the user."""

    @classmethod
    def parse(
        cls,
        data: Mapping[str, Any],
        origin: Origin = Origin(section=("deepspeed",)),
        precision: Precision | None = None,
    ) -> "DeepSpeedSettings":
        """Check a JSON against the table, and against ``train.precision``; raise UserError, a line for each fault."""
        document, faults, notes = read_document(data, precision)
        report([origin.line(fault) for fault in faults])
        return cls(document, origin, tuple(map(origin.line, notes)))

    @property
    def precision(self) -> Precision:
        """The dtype of the model's parameters and activations."""
        for name in ("bf16", "fp16"):
            if self.document.get(name, {}).get("enabled"):
                return name
        return "fp32"

    @property
    def gradient_precision(self) -> Precision:
        """The dtype in which the gradients of a step are added up; fp32 unless the JSON asks for less memory."""
        return self.document.get("data_types", {}).get("grad_accum_dtype", "fp32")

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage, 0 to 3."""
        return self.document.get("zero_optimization", {}).get("stage", 0)

    @property
    def recompute(self) -> dict[str, int]:
        """What the JSON asks of recomputed activations, by dotted key; empty where it asks for nothing."""
        return {
            f"{name}.{key}": self.document[name][key]
            for name, keys in RECOMPUTE_KEYS.items()
            for key in keys
            if key in self.document.get(name, {})
        }

    @property
    def on_nvme(self) -> tuple[str, ...]:
        """The sections of ``zero_optimization`` whose tensors lie on an NVMe device."""
        zero = self.document.get("zero_optimization", {})
        return tuple(s for s in ("offload_optimizer", "offload_param") if zero.get(s, {}).get("device") == "nvme")

    @property
    def asks_deepspeed_to_report(self) -> bool:
        """Whether a key asks DeepSpeed for words of its own, which is silent otherwise."""
        asked = ("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state")
        sections = (self.document.get("comms_logger", {}), self.document.get("timers", {}).get("throughput", {}))
        return any(self.document.get(key) for key in asked) or any(section.get("enabled") for section in sections)

    @property
    def gradient_clipping(self) -> float:
        """The largest global gradient norm; 0 means no clipping. DeepSpeed clips at 1.0 unless told otherwise."""
        return self.document.get("gradient_clipping", 1.0)

    @property
    def optimizer(self) -> dict[str, Any] | None:
        """The name and hyperparameters of the optimizer where the JSON has an ``optimizer`` section."""
        return self.optimizer_with({})

    def optimizer_with(self, stated: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the JSON's optimizer as ``train.optimizer`` would state it; what it leaves open is as `stated`.

        What neither states is megalite's default where the JSON says "auto", and DeepSpeed's where it says nothing.
        None where the JSON has no ``optimizer`` section.
        """
        if (section := self.document.get("optimizer")) is None:
            return None
        declared, params = declaration_of_type(section["type"]), section["params"]
        auto = {name: value for name, value in declared.defaults.items() if params.get(name) == "auto"}
        given = {name: value for name, value in params.items() if value != "auto"}
        held = {name: value for name, value in stated.items() if name in declared.defaults}
        complete = {**declared.deepspeed_defaults, **auto, **held, **given}
        return {"name": declared.name, **complete, "betas": tuple(complete["betas"])}

    def optimizer_disagreements(self, stated: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], Any]]:
        """Find what the JSON's optimizer has other than `stated`: the name here, the key there, and its value."""
        section = self.document.get("optimizer", {})
        params = section.get("params", {})
        for name, value in stated.items():
            theirs = params.get(name, "auto")
            if name == "name" and section and declaration_of_type(section["type"]).name != value:
                yield name, ("optimizer", "type"), section["type"]
            elif theirs != "auto" and theirs != (list(value) if isinstance(value, tuple) else value):
                yield name, ("optimizer", "params", name), theirs

    @property
    def scheduler(self) -> dict[str, Any] | None:
        """DeepSpeed's learning-rate scheduler: ``{"type": ..., "params": {...}}``."""
        return copy.deepcopy(self.document.get("scheduler"))

    @property
    def scheduler_is_auto(self) -> bool:
        """Whether the JSON's scheduler states no value: every parameter that it names is "auto"."""
        params = self.document.get("scheduler", {}).get("params", {})
        return bool(params) and all(value == "auto" for value in params.values())

    def without_scheduler(self, run_file: str) -> Self:
        """Return the settings with a scheduler that has given way to ``train.schedule`` of `run_file`, and a note."""
        document = {name: section for name, section in self.document.items() if name != "scheduler"}
        note = Fault(("scheduler",), f" is left out: all its params are 'auto', and {run_file} states train.schedule")
        return replace(self, document=document, notes=(*self.notes, self.origin.line(note)))

    def resolve_auto(
        self,
        *,
        hidden_size: int,
        steps: int,
        lr: float,
        optimizer: Mapping[str, Any] | None = None,
        warmup_steps: int | None = None,
    ) -> "DeepSpeedSettings":
        """Return the settings with the remaining "auto" values replaced.

        Bucket sizes follow the hidden size as they do in transformers; the scheduler follows the run's steps, its
        learning rate and its warm-up; the optimizer what the run file states of it. `warmup_steps` None: the run file
        states none. DeepSpeed warms up for at least one step, so that a warm-up of 0 is written as 1.
        """
        document = copy.deepcopy(dict(self.document))
        area = hidden_size * hidden_size
        buckets = {
            "reduce_bucket_size": area,
            "stage3_prefetch_bucket_size": area * 9 // 10,
            "stage3_param_persistence_threshold": 10 * hidden_size,
        }
        _fill(document.get("zero_optimization", {}), buckets)
        if complete := self.optimizer_with(optimizer or {}):
            del complete["name"]
            complete["betas"] = list(complete["betas"])
            document["optimizer"]["params"] |= complete
        params = document.get("scheduler", {}).get("params", {})
        if warmup_steps is not None and self.warms_up:
            params.setdefault("warmup_num_steps", "auto")
        rates = {"warmup_min_lr": 0.0, "warmup_max_lr": lr, "cycle_max_lr": lr, "total_num_steps": steps}
        _fill(params, {**rates, "warmup_num_steps": max(1, warmup_steps or 0)})
        return replace(self, document=document)

    @property
    def warms_up(self) -> bool:
        """Whether the JSON's scheduler has a warm-up of so many steps."""
        return "warmup_num_steps" in SCHEDULERS.get(self.document.get("scheduler", {}).get("type", ""), {})

    def disagreements(self, values: Mapping[str, int | None], run_file: str) -> Iterator[Fault]:
        """Find stated values that are not the run file's; `values` holds them by `Derived.follows`."""
        for key, rule in _derived(TABLE):
            stated = self.document
            for name in key[:-1]:
                stated = stated.get(name, {})
            value, expected = stated.get(key[-1]), values.get(rule.follows)
            if value is not None and expected is not None and value != expected:
                text = f"={value} disagrees with {rule.follows}={expected} of {run_file}; write 'auto' or {expected}"
                yield Fault(key, text)

    def without_derived(self) -> Self:
        """Return the JSON without what restates the run file."""
        document = copy.deepcopy(dict(self.document))
        for key, _ in _derived(TABLE):
            section = document
            for name in key[:-1]:
                section = section.get(name, {})
            section.pop(key[-1], None)
        return replace(self, document=document)

    def spelled(self) -> dict[str, Any]:
        """Return the JSON as it is written into a file: a path reads back as it is."""
        document = copy.deepcopy(dict(self.document))
        for section in document.get("zero_optimization", {}).values():
            if isinstance(section, dict) and "nvme_path" in section:
                section["nvme_path"] = escape(section["nvme_path"])
        return document

    def engine_config(self, micro_batch_size: int, gradient_accumulation_steps: int) -> dict[str, Any]:
        """Return the JSON for ``deepspeed.initialize``, without the optimizer, which megalite builds itself."""
        config = copy.deepcopy(dict(self.document))
        engines_not = ("optimizer", "pipeline", "activation_checkpointing", "data_types")
        for name in (*engines_not, "vocabulary_size", "train_batch_size"):
            config.pop(name, None)
        config["train_micro_batch_size_per_gpu"] = micro_batch_size
        config["gradient_accumulation_steps"] = gradient_accumulation_steps
        config["gradient_clipping"] = self.gradient_clipping
        return config


def _fill(section: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if section.get(name) == "auto":
            section[name] = value


def _derived(rules: Mapping[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Derived]]:
    for name, rule in rules.items():
        if isinstance(rule, Derived):
            yield (*at, name), rule
        elif isinstance(rule, Mapping):
            yield from _derived(rule, (*at, name))
