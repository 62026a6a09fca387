"""Parameter counts of ranks and stages, from stages on the meta device, which have shapes and no memory."""

from megalite.model.structure import meta_stage
from megalite.planning.plan import Plan


class ParameterCounts:
    """Counts the parameters that a rank of a plan holds, before ZeRO partitions them."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._frozen = plan, plan.frozen
        self._counted: dict[tuple[object, ...], tuple[int, int]] = {}

    def of_rank(self, rank: int, *, trained: bool = False) -> int:
        """Return the number of parameters of all stages of a rank; with `trained` without frozen ones."""
        layout, placement = self._plan.layout, self._plan.placement
        tensor = layout.index(rank, "tensor")
        stages = placement.stages_of(layout.index(rank, "pipeline"))
        return sum(self.of_stage(stage, tensor, trained=trained) for stage in stages)

    def of_stage(self, stage: int, tensor: int, *, trained: bool = False) -> int:
        """Return the number of parameters that rank `tensor` of the tensor axis holds of a stage."""
        plan, placement = self._plan, self._plan.placement
        model, layers, last = plan.config.model, plan.stage_layers[stage], placement.num_stages - 1
        # All middle stages with the same kinds of layers are equally large unless some are frozen: cache the count.
        kinds = layers if self._frozen else tuple(map(model.layer_kind, layers))
        kind = (kinds, stage == 0, stage == last, tensor)
        if kind not in self._counted:
            shares = stage == last > 0 and placement.rank_of(0) == placement.rank_of(stage)
            place = (tensor, plan.layout.size("tensor"))
            built = meta_stage(model, layers, stage, last + 1, tensor=place, shares_rank=shares)
            self._counted[kind] = built.num_parameters(), built.num_parameters(without=self._frozen)
        every, not_frozen = self._counted[kind]
        return not_frozen if trained else every
