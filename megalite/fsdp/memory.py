"""What the torch engine holds at a moment: bytes of the tensors that are there, by kind."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from megalite.fsdp.engine import TorchEngine


@dataclass(frozen=True, slots=True)
class HeldBytes:
    """Bytes on this rank, without activations and the buffers of collectives."""

    shares: int
    """Weights that the optimizer updates, and frozen ones."""
    gathered: int
    """Whole weights that are gathered now."""
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.shares + self.gathered + self.gradients + self.optimizer


def held_bytes(engine: "TorchEngine") -> HeldBytes:
    """Return the bytes that the engine of this rank holds now."""
    shares = gathered = gradients = 0
    for parameter in engine.fsdp_parameters():
        shares += _bytes(parameter._sharded_param_data)
        gathered += sum(map(_bytes, getattr(parameter, "all_gather_outputs", ())))
        whole = getattr(parameter, "_unsharded_param", None)
        for gradient in (
            parameter.sharded_param.grad,
            parameter.unsharded_accumulated_grad,
            getattr(whole, "grad", None),
        ):
            gradients += _bytes(gradient)
    state = (value for values in engine.optimizer.state.values() for value in values.values())
    return HeldBytes(shares, gathered, gradients, sum(map(_bytes, state)))


def _bytes(tensor: Any) -> int:
    """Return the bytes of a tensor's storage: 0 where FSDP2 has freed it."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not isinstance(local, Tensor):
        return 0
    return local.numel() * local.element_size() if local.untyped_storage().size() else 0
