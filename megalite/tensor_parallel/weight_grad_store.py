"""Weight gradients put off: the half of a linear layer's backward that nobody downstream waits for.

A backward makes two products of a layer's output gradient: that for the layer's input, which the layer before it
needs at once, and that for its weight, which nobody needs before the step. A zero-bubble pipeline (arXiv:2401.10241)
computes the second where it would otherwise wait.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class DeferredProducts:
    """The weight gradients that one backward left to be computed, with the inputs that they are computed from.

    Biases, norms, embeddings, and projections of which a rank computes only some rows, are never put off: their
    gradients are in the backward as ever.
    """

    def __init__(self) -> None:
        self._products: deque[tuple[nn.Parameter, Callable[[], Tensor]]] = deque()

    def __len__(self) -> int:
        return len(self._products)

    def put(self, parameter: nn.Parameter, product: Callable[[], Tensor]) -> None:
        """Leave `product` for later; it returns a gradient of `parameter`, and keeps its inputs alive until then."""
        self._products.append((parameter, product))

    @torch.no_grad()
    def run(self, accumulate: Callable[[nn.Parameter, Tensor], None]) -> None:
        """Compute each product, hand it over with its parameter and drop its inputs; afterwards nothing is left.

        In the order of the backward, on every rank alike: under sequence parallelism each begins with a gather over
        the tensor group. The gradient is new memory in the shape and precision of the parameter, and the receiver's
        to keep; the parameter itself need not be there (ZeRO-3).
        """
        while self._products:
            parameter, product = self._products.popleft()
            accumulate(parameter, product())


class WeightGradients:
    """Whether the linear layers of one stage compute weight gradients in the backward or put them off."""

    def __init__(self) -> None:
        self.deferred: DeferredProducts | None = None
        """Where products go while `collecting`; None: they are computed at once."""

    @contextmanager
    def collecting(self) -> Iterator[DeferredProducts]:
        """Put the products of the backwards inside off, to what is yielded; raise RuntimeError inside another."""
        if self.deferred is not None:
            raise RuntimeError("weight gradients of this stage are being collected already")
        self.deferred = DeferredProducts()
        try:
            yield self.deferred
        finally:
            self.deferred = None
