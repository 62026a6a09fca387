"""Tensor parallelism: one layer's work split over the ranks of the ``tensor`` axis (Megatron-LM, arXiv:1909.08053).

``collectives`` holds the conjugate communication operators, ``layers`` and ``cross_entropy`` are built from them,
``init`` fills parameters from a seed and their global names, whatever the layout, ``weight_grad_store`` puts products
for weight gradients off. Which slice of a global tensor a rank holds is said by `megalite.parallel.sharding`.
"""
