"""Every contender by name; a new one is one more class here."""

from contender_megalite import Megalite
from peers_deepspeed import DeepSpeedPipeline, DeepSpeedZero1, DeepSpeedZero2, DeepSpeedZero3
from peers_pipelining import GPipeTorch, InterleavedTorch, PipelineTorch, ZeroBubbleTorch
from peers_torch import AutocastTorch, CompiledTorch, DTensorTorch, PlainTorch
from variants import VARIANTS
from workload import Contender

ALWAYS: tuple[type[Contender], ...] = (
    Megalite,
    PlainTorch,
    DTensorTorch,
    PipelineTorch,
    DeepSpeedZero1,
    DeepSpeedPipeline,
)
"""What train_step.py runs unless told otherwise."""
ON_REQUEST: tuple[type[Contender], ...] = (
    AutocastTorch,
    CompiledTorch,
    GPipeTorch,
    InterleavedTorch,
    ZeroBubbleTorch,
    DeepSpeedZero2,
    DeepSpeedZero3,
    *VARIANTS,
)
"""torch under autocast is no faster than with masters, compiled it waits a minute for its C++ build; the others are for
parallel.py."""
CONTENDERS: dict[str, type[Contender]] = {contender.name: contender for contender in (*ALWAYS, *ON_REQUEST)}
