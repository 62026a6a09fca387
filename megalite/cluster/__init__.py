"""Jobs of a cluster's scheduler: batch scripts, made of the templates in ``templates/``, which is also ``slurm/``."""

from megalite.cluster.script import LAUNCHERS, Job, render
from megalite.cluster.sizes import ranks_per_node, tensor_over_nodes

__all__ = ["LAUNCHERS", "Job", "ranks_per_node", "render", "tensor_over_nodes"]
