"""Slurm batch scripts for a run, rendered from the templates in ``templates/``, which is also ``slurm/``."""

from megalite.slurm.ranks_per_node import ranks_per_node, tensor_over_nodes_warning
from megalite.slurm.script import LAUNCHERS, Job, render

__all__ = ["LAUNCHERS", "Job", "ranks_per_node", "render", "tensor_over_nodes_warning"]
