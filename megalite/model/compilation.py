"""Compilation of Transformer layers by torch.compile: one compilation for all layers and microbatches of a stage."""

import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from megalite.errors import UserError

if TYPE_CHECKING:
    from megalite.model.packing import PackedDocuments

BACKEND = "inductor"
"""The backend of torch.compile, which makes kernels of the graph."""

P, R = ParamSpec("P"), TypeVar("R")


def compile_layer(run: Callable[P, R]) -> Callable[P, R]:
    """Return a function of a layer and its inputs, compiled as one graph; a call that cannot be traced raises.

    The compiled code is the same for all layers that differ in their parameters alone. A forward without gradients, as
    in evaluation, is compiled a second time.
    """
    import torch

    return torch.compile(run, backend=BACKEND, fullgraph=True, dynamic=False)


def prepare_inputs(packing: "PackedDocuments | None") -> None:
    """Declare that the number of documents differs between microbatches, so that one compilation serves them all."""
    import torch

    if packing is not None and packing.cu_seqlens is not None:
        torch._dynamo.mark_dynamic(packing.cu_seqlens, 0)


def require_compiler() -> None:
    """Raise UserError where this host has no C++ compiler, which torch.compile calls on CPUs and for launching kernels.

    It is found as torch finds it.
    """
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise UserError(
            f"train.compile=true needs a C++ compiler, and {name!r} is not there; install it (apt install g++, or dnf "
            "install gcc-c++), name another in the environment variable CXX, or write train.compile=false"
        )
