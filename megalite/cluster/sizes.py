"""How a layout's ranks fall on nodes."""

from typing import TYPE_CHECKING

from megalite.errors import UserError

if TYPE_CHECKING:
    from megalite.config import RunConfig


def ranks_per_node(config: "RunConfig", nodes: int, given: int | None) -> int:
    """Return how many ranks each of `nodes` nodes has, where the user gave that number or None.

    Raises UserError where the layout's ranks do not fall on the nodes evenly, and where ``parallel.data: auto`` leaves
    their number open.
    """
    parallel, source = config.parallel, config.source
    model = parallel.tensor * parallel.pipeline
    if parallel.data == "auto":
        shape = f"tensor {parallel.tensor} x pipeline {parallel.pipeline}"
        if given is None:
            raise UserError(
                f"{source}: parallel.data=auto leaves the number of ranks open; "
                f"give --ranks-per-node, or parallel.data={max(1, nodes // model)}"
            )
        if nodes * given % model:
            raise UserError(
                f"--nodes {nodes} with --ranks-per-node {given} is {_ranks(nodes * given)}, no multiple of the {model} "
                f"of {shape} in {source}; use --ranks-per-node {_next_multiple(given, nodes, model)}"
            )
        return given
    world, layout = model * parallel.data, config.layout
    if world % nodes:
        fitting = ", ".join(str(count) for count in range(1, world + 1) if world % count == 0)
        raise UserError(
            f"{source}: {layout} is {_ranks(world)}, which do not fall evenly on --nodes {nodes}; use one of {fitting}"
        )
    if given not in (None, world // nodes):
        raise UserError(
            f"--nodes {nodes} with --ranks-per-node {given} is {_ranks(nodes * given)}, but {layout} in {source} is "
            f"{world}; use --ranks-per-node {world // nodes}, or parallel.data=auto"
        )
    return world // nodes


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _next_multiple(given: int, nodes: int, model: int) -> int:
    """The least number of ranks a node, from `given`, with which whole copies of the model fill the nodes."""
    return next(count for count in range(given, given + model + 1) if nodes * count % model == 0)
