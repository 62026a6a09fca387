"""Memory estimate of a rank's model state, from the settings alone.

It includes weights, gradients, the reduction buffers of gradients, and the optimizer's state. It excludes activations,
the layers that ZeRO-3 gathers for use, and the memory of the device's libraries.
"""

from dataclasses import dataclass

from megalite.config import RunConfig

_BUCKET = 500_000_000
"""The largest number of elements of a reduction buffer, if the DeepSpeed JSON has no `reduce_bucket_size`."""
_FP32 = 4


@dataclass(frozen=True, slots=True)
class RankBytes:
    """The model state of one rank, in bytes: on its device, and offloaded."""

    weights: int
    gradients: int
    """Not partitioned at any ZeRO stage until the end of a step."""
    reduction: int
    """The reduction buffers, and from ZeRO stage 1 on this rank's partition of the reduced gradients."""
    optimizer: int
    """The optimizer's state, and from ZeRO stage 1 on the master weights; all in fp32."""
    offloaded: int = 0
    """State in host memory or on NVMe, which is not included in the other fields."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.reduction + self.optimizer


def rank_bytes(config: RunConfig, parameters: int, trained: int | None = None) -> RankBytes:
    """Return the estimate for a rank with `parameters` parameters, before ZeRO partitions them.

    `trained` of them are not frozen; None means all.
    """
    trained = parameters if trained is None else trained
    stage, ranks = config.zero_stage, config.layout.group_size("shard")
    weight = _FP32 if config.precision == "fp32" else 2
    accumulated = config.deepspeed.gradient_precision if config.precision != "fp32" else "fp32"
    gradient = _FP32 if accumulated == "fp32" else 2
    weights = weight * (-(-parameters // ranks) if stage == 3 else parameters)
    share = -(-trained // ranks)
    zero = config.deepspeed.document.get("zero_optimization", {})
    bucket = zero.get("reduce_bucket_size", min(_BUCKET, trained)) if stage else min(_BUCKET, trained)
    buffers = 2 if stage in (1, 2) and zero.get("overlap_comm") and zero.get("contiguous_gradients", True) else 1
    reduction = buffers * bucket * gradient + (share * gradient if stage else 0)
    tensors = len(config.optimizer.declaration.state_tensors)
    optimizer = _FP32 * ((tensors + 1) * share if stage else tensors * trained)
    offloaded = 0
    if _off_device(zero.get("offload_optimizer")):
        offloaded, optimizer = offloaded + optimizer, 0
    if _off_device(zero.get("offload_param")):
        offloaded, weights = offloaded + weights, 0
    return RankBytes(weights, gradient * trained, reduction, optimizer, offloaded)


def _off_device(section: dict[str, object] | None) -> bool:
    return section is not None and section.get("device") in ("cpu", "nvme")


def unit_for(number: int) -> tuple[str, int]:
    """Return a readable unit for a number of bytes, and the size of the unit in bytes.

    >>> unit_for(3 << 30), unit_for(5 << 20)
    (('GiB', 1073741824), ('MiB', 1048576))
    """
    return ("GiB", 1 << 30) if number >= 1 << 30 else ("MiB", 1 << 20)
