"""Every contender by name; a new one is one more class here."""

from peers_deepspeed import DeepSpeedPipeline, DeepSpeedZero1
from peers_torch import AutocastTorch, CompiledTorch, DTensorTorch, PipelineTorch, PlainTorch
from workload import Contender

PEERS: tuple[type[Contender], ...] = (
    PlainTorch,
    AutocastTorch,
    CompiledTorch,
    DTensorTorch,
    PipelineTorch,
    DeepSpeedZero1,
    DeepSpeedPipeline,
)
CONTENDERS: dict[str, type[Contender]] = {contender.name: contender for contender in PEERS}
ON_REQUEST = ("torch-autocast", "torch-compiled")
"""Not part of a plain run: the first is no faster than the masters, the second waits a minute for its C++ build."""
