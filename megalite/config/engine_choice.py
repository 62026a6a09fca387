"""Which sharding engine a run has, and what of a DeepSpeed JSON the torch engine lacks or does not need."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from megalite.config.sections import ParallelSection
from megalite.settings.validation import Fault, Key, Origin

Engine = Literal["torch", "deepspeed"]

_LACKS: dict[Key, str] = {
    ("scheduler",): "which takes the learning rate from train.schedule; write train.schedule in its place",
    ("zero_optimization", "offload_optimizer"): "which keeps optimizer state on the device; leave it out",
    ("zero_optimization", "offload_param"): "which keeps weights on the device; leave it out",
    ("communication_data_type",): "which reduces in data_types.grad_accum_dtype; write that, or leave it out",
}
"""Keys that only DeepSpeed's engine has, with the torch engine's way."""


def chosen_engine(parallel: ParallelSection) -> Engine:
    """Return the engine that ``parallel.engine`` names; "auto" is DeepSpeed's."""
    return "torch" if parallel.engine == "torch" else "deepspeed"


def engine_faults(engine: Engine, document: Mapping[str, Any], origin: Origin) -> Iterator[Fault]:
    """Find what the DeepSpeed JSON asks for and the torch engine lacks."""
    if engine == "deepspeed":
        return
    for key, instead in _LACKS.items():
        value: Any = document
        for name in key:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is None or (isinstance(value, Mapping) and value.get("device") == "none"):
            continue
        text = f"='torch' lacks {origin.line(Fault(key, ''))}, and {instead}, or write parallel.engine=deepspeed"
        yield Fault(("parallel", "engine"), text)
