"""The number of ranks on each node for a layout, and a warning if a tensor-parallel group spans nodes."""

from math import gcd
from typing import TYPE_CHECKING

from megalite.errors import UserError

if TYPE_CHECKING:
    from megalite.config import RunConfig


def ranks_per_node(config: "RunConfig", nodes: int, given: int | None, gpus: int | None = None) -> int:
    """Return the number of ranks on each of `nodes` nodes; `given` is the user's number, or None.

    `gpus` is the number of GPUs per node, None for a job without GPUs; every rank needs a GPU of its own. Raises
    UserError if a node has fewer GPUs than ranks, if the layout's ranks do not divide evenly among the nodes, and if
    ``parallel.data: auto`` leaves the number of ranks undetermined.
    """
    if given is not None and gpus is not None and given > gpus:
        raise UserError(
            f"--ranks-per-node {given} with --gpus-per-node {gpus}: each rank takes a GPU of its own; use "
            f"--ranks-per-node {gpus}, or --gpus-per-node {given}"
        )
    parallel = config.parallel
    if parallel.data == "auto":
        return _for_open_layout(config, nodes, given or gpus, gpus)
    return _for_layout(config, nodes, given, gpus)


def tensor_over_nodes_warning(tensor: int, per_node: int, nodes: int) -> str | None:
    """Return a warning if a tensor-parallel group spans several nodes; None otherwise."""
    if nodes == 1 or per_node % tensor == 0:
        return None
    fits = gcd(tensor, per_node)
    return (
        f"warning: parallel.tensor={tensor} does not divide the {_ranks(per_node)} of a node: its collectives, the "
        f"most frequent ones, go over the network; use parallel.tensor={fits} and a larger parallel.pipeline, or nodes "
        "with more ranks"
    )


def _for_open_layout(config: "RunConfig", nodes: int, per_node: int | None, gpus: int | None) -> int:
    """Return the ranks per node with ``parallel.data: auto``; raise unless whole copies of the model fill the nodes."""
    parallel, source = config.parallel, config.source
    replica = parallel.layout(data=1)
    model = replica.world_size
    if per_node is None:
        raise UserError(
            f"{source}: parallel.data=auto leaves the number of ranks undetermined; "
            f"give --ranks-per-node, or parallel.data={max(1, nodes // model)}"
        )
    if nodes * per_node % model:
        step = model // gcd(model, per_node)
        below = nodes // step * step
        fixes = [f"--nodes {count}" for count in (below, below + step) if count]
        more = _next_multiple(per_node, nodes, model)
        if gpus is None or more <= gpus:
            fixes.append(f"--ranks-per-node {more}")
        axes = " x ".join(f"{name} {replica.size(name)}" for name in replica.names if name != "data")
        raise UserError(
            f"--nodes {nodes} with {_option(per_node, gpus)} is {_ranks(nodes * per_node)}, not a multiple of the "
            f"{model} of {axes} in {source}; use {', or '.join(fixes)}"
        )
    return per_node


def _for_layout(config: "RunConfig", nodes: int, given: int | None, gpus: int | None) -> int:
    """Divide the ranks of a layout among the nodes; raise if the result contradicts the user's options."""
    source, layout = config.source, config.layout
    world = layout.world_size
    if world % nodes:
        fitting = ", ".join(str(count) for count in _divisors(world) if gpus is None or world // count <= gpus)
        raise UserError(
            f"{source}: {layout} is {_ranks(world)}, which --nodes {nodes} does not divide; use one of {fitting}"
        )
    per_node = world // nodes
    if gpus is not None and per_node > gpus:
        enough = next(count for count in _divisors(world) if world // count <= gpus)
        raise UserError(
            f"{source}: {layout} is {_ranks(per_node)} on each of --nodes {nodes}, and each rank takes a GPU of its "
            f"own, of which --gpus-per-node gives {gpus}; use --nodes {enough}"
        )
    if given not in (None, per_node):
        raise UserError(
            f"--nodes {nodes} with --ranks-per-node {given} is {_ranks(nodes * given)}, but {layout} in {source} is "
            f"{world}; use --ranks-per-node {per_node}, or parallel.data=auto"
        )
    if given is None and gpus is not None and per_node < gpus:
        raise UserError(
            f"{source}: {layout} is {_ranks(per_node)} on each of --nodes {nodes}, fewer than --gpus-per-node {gpus}; "
            f"use --gpus-per-node {per_node}, parallel.data=auto, or --ranks-per-node {per_node} to leave GPUs idle"
        )
    return per_node


def _option(per_node: int, gpus: int | None) -> str:
    return f"--gpus-per-node {per_node}" if per_node == gpus else f"--ranks-per-node {per_node}"


def _divisors(world: int) -> list[int]:
    return [count for count in range(1, world + 1) if world % count == 0]


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _next_multiple(given: int, nodes: int, model: int) -> int:
    """Return the smallest number of ranks per node, at least `given`, for which whole model copies fill the nodes."""
    return next(count for count in range(given, given + model + 1) if nodes * count % model == 0)
