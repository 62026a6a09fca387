"""Tensor parallelism: each layer is split over the ranks of the ``tensor`` axis (Megatron-LM, arXiv:1909.08053).

``collectives`` holds the conjugate communication operators; ``layers`` and ``cross_entropy`` are built from them.
``init`` initialises parameters from a seed and their global names, the same under every layout. ``weight_grad_store``
defers the computation of weight gradients. `megalite.parallel.sharding` says which slice of a global tensor a rank
holds.
"""
