"""Optimizers that do not import torch's compiler, which takes seconds and is not used."""

import inspect
from typing import Any

import torch

_CACHE = "__dynamo_disable"


def skip_dynamo_import() -> None:
    """Patch `torch.optim.Optimizer` so that its methods do not import ``torch._dynamo``, some 900 modules.

    torch decorates the methods so that the first call imports the compiler, in order to exclude the method from
    compilation, and caches the resulting function in an attribute. This function puts the plain method into that cache.
    The only difference: an optimizer that is called inside compiled code is traced.
    """
    for method in vars(torch.optim.Optimizer).values():
        plain: Any = getattr(method, "__wrapped__", None)
        # Only the wrappers of `torch._disable_dynamo` read the attribute.
        if plain is not None and not hasattr(plain, _CACHE):
            setattr(plain, _CACHE, plain)


class AdamW(torch.optim.AdamW):
    """torch's AdamW without differentiability, whose `step` does not import the compiler."""

    # torch wraps `step` twice: in the profiler's hook, which it also puts around this `step`, and in a decorator that
    # imports the compiler and disables gradients, which `no_grad` does here.
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
