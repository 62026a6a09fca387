"""Every contender by name; a new one is one more class here."""

from contender_megalite import Megalite
from peers_deepspeed import DeepSpeedPipeline, DeepSpeedZero1
from peers_torch import AutocastTorch, CompiledTorch, DTensorTorch, PipelineTorch, PlainTorch
from workload import Contender

ALL: tuple[type[Contender], ...] = (
    Megalite,
    PlainTorch,
    AutocastTorch,
    CompiledTorch,
    DTensorTorch,
    PipelineTorch,
    DeepSpeedZero1,
    DeepSpeedPipeline,
)
CONTENDERS: dict[str, type[Contender]] = {contender.name: contender for contender in ALL}
ON_REQUEST = ("torch-autocast", "torch-compiled")
"""Not part of a plain run: the first is no faster than the masters, the second waits a minute for its C++ build."""
