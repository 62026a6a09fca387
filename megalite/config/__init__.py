"""The run file: typed, frozen, validated, and every fault in it told at once.

``load_run_config`` reads YAML, dotted overrides and the DeepSpeed JSON; it checks each value and each section.
``RunConfig.resolve`` knows the number of ranks and the tokenizer's vocabulary, and checks how the sections fit
together. Whatever is wrong becomes one `UserError`: a line a fault, in the form *where, what was found, what is
allowed, the nearest fix*. Nothing here imports torch.
"""

from megalite.config.cross_checks import tensor_size_fault
from megalite.config.data import DataSection, DataSource, ValidationSet
from megalite.config.load import load_run_config
from megalite.config.run_config import RunConfig
from megalite.config.sections import (
    OptimizerSection,
    RampupSection,
    ScheduleSection,
    TrainSection,
)
from megalite.model.config import ModelConfig
from megalite.model.recompute import Recompute
from megalite.model.registry import read_model

__all__ = [
    "DataSection",
    "DataSource",
    "ModelConfig",
    "OptimizerSection",
    "RampupSection",
    "Recompute",
    "RunConfig",
    "ScheduleSection",
    "TrainSection",
    "ValidationSet",
    "load_run_config",
    "read_model",
    "tensor_size_fault",
]
