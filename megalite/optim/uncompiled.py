"""Optimizers without torch's compiler, whose modules take seconds to import in a process that compiles nothing."""

import inspect
from typing import Any

import torch

_CACHE = "__dynamo_disable"


def leave_the_compiler_out() -> None:
    """Let optimizers be made without an import of ``torch._dynamo``, some 900 modules.

    torch decorates methods of `torch.optim.Optimizer` such that the first call imports the compiler, to shut the
    method out of what may be compiled, and keeps the function that comes of it as an attribute. Here the plain method
    is put there. The one difference: where an optimizer is called inside compiled code, its methods are traced.
    """
    for method in vars(torch.optim.Optimizer).values():
        plain: Any = getattr(method, "__wrapped__", None)
        # Only `torch._disable_dynamo` makes wrappers that read the attribute; on others it is never read.
        if plain is not None and not hasattr(plain, _CACHE):
            setattr(plain, _CACHE, plain)


class AdamW(torch.optim.AdamW):
    """torch's AdamW, not differentiable, whose step imports no compiler."""

    # torch's own `step` is wrapped twice: by the profiler's hook, which it puts around this one too, and by what
    # imports the compiler, sets whether gradients are recorded, and sets it back.
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
