"""A fourth axis that only the tests declare: replicas of the model, which ZeRO divides over or does not."""

from typing import Any, ClassVar

from megalite.config.sections import ParallelSection
from megalite.parallel.layout import DATA, PIPELINE, TENSOR, Axis, Meaning
from megalite.planning.plan import Plan, plan_of

WHOLE = Axis("replica", frozenset[Meaning](("batch", "gradient", "loss")))
"""Hybrid sharding: each replica has all of the optimizer's state."""
DIVIDED = Axis("replica", frozenset[Meaning](("batch", "gradient", "shard", "loss")))


class _WholeReplicas(ParallelSection, frozen=True):
    replica: int = 2
    axes: ClassVar[tuple[Axis, ...]] = (PIPELINE, WHOLE, DATA, TENSOR)


class _DividedReplicas(_WholeReplicas, frozen=True):
    axes: ClassVar[tuple[Axis, ...]] = (PIPELINE, DIVIDED, DATA, TENSOR)


def whole_replicas(plan: Plan) -> Plan:
    """Make two replicas of the ranks of a plan's data axis."""
    return _replan(plan, _WholeReplicas)


def divided_replicas(plan: Plan) -> Plan:
    """Make two replicas of the ranks of a plan's data axis; ZeRO divides over them as well."""
    return _replan(plan, _DividedReplicas)


def _replan(plan: Plan, section: type[_WholeReplicas]) -> Plan:
    settings: dict[str, Any] = dict(plan.config.parallel) | {"data": plan.layout.size("data") // 2}
    parallel = section(**settings)
    config = plan.config.model_copy(update={"parallel": parallel})
    return plan_of(config.resolve(world_size=plan.layout.world_size, vocab_size=None), plan.tokenizer_digest)
