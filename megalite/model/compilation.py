"""Compilation of Transformer layers by torch.compile: one compilation for all layers and microbatches of a stage."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from megalite.model.packing import PackedDocuments

BACKEND = "inductor"
"""The backend of torch.compile, which makes kernels of the graph."""

P = ParamSpec("P")
R = TypeVar("R")


def compile_layer(run: Callable[P, R]) -> Callable[P, R]:
    """Return a function of a layer and its inputs, compiled as one graph; a call that cannot be traced raises.

    The compiled code is the same for all layers that differ in their parameters alone. A forward without gradients, as
    in evaluation, is compiled a second time.
    """
    return torch.compile(run, backend=BACKEND, fullgraph=True, dynamic=False)


def declare_dynamic(packing: PackedDocuments | None) -> None:
    """Declare that the number of documents differs between microbatches, so that one compilation serves them all."""
    if packing is not None and packing.cu_seqlens is not None:
        torch._dynamo.mark_dynamic(packing.cu_seqlens, 0)
