"""Deferred weight gradients, as zero-bubble pipeline schedules need them (WeightGradStore, arXiv:2401.10241).

The backward of a linear layer computes two products: the gradient of the input, which the previous layer needs at once,
and the gradient of the weight, which is needed only at the end of the step. A zero-bubble schedule computes the second
product where the rank would otherwise idle.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightGradStore:
    """The deferred weight gradients of one backward: a queue of products with their inputs.

    Gradients of biases, norms, embeddings and `ReplicatedKVLinear` are never deferred; the backward computes them.
    """

    def __init__(self) -> None:
        self._products: deque[tuple[nn.Parameter, Callable[[], Tensor]]] = deque()

    def __len__(self) -> int:
        return len(self._products)

    def put(self, parameter: nn.Parameter, product: Callable[[], Tensor]) -> None:
        """Defer `product`, which returns a gradient of `parameter`; it keeps its inputs alive until `run`."""
        self._products.append((parameter, product))

    @torch.no_grad()
    def run(self, accumulate: Callable[[nn.Parameter, Tensor], None]) -> None:
        """Compute all products, call `accumulate` with each parameter and its gradient, and empty the queue.

        The products run in the order of the backward, the same on every rank, since with sequence parallelism each
        begins with an all-gather over the tensor group. The gradient is a new tensor in the shape and precision of the
        parameter, and `accumulate` may keep it. The parameter may be partitioned meanwhile (ZeRO-3).
        """
        while self._products:
            parameter, product = self._products.popleft()
            accumulate(parameter, product())


class WeightGradDeferral:
    """A switch for the linear layers of one stage: compute weight gradients in the backward, or defer them."""

    def __init__(self) -> None:
        self.store: WeightGradStore | None = None
        """The store of deferred products inside `enabled`; None: products are computed in the backward."""

    @contextmanager
    def enabled(self) -> Iterator[WeightGradStore]:
        """Defer the weight gradients of the backwards inside to the yielded store; raise RuntimeError if nested."""
        if self.store is not None:
            raise RuntimeError(
                "the weight gradients of this stage are deferred already; end the other `enabled` block first"
            )
        self.store = WeightGradStore()
        try:
            yield self.store
        finally:
            self.store = None
