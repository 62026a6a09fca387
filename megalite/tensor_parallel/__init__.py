"""Tensor parallelism: one layer's work split over the ranks of the ``tensor`` axis (Megatron-LM, arXiv:1909.08053).

``sharding`` says which slice of a global tensor a rank holds, ``collectives`` holds the conjugate communication
operators, ``layers`` and ``cross_entropy`` are built from the two, ``initialisation`` fills parameters from a seed
and their global names, whatever the layout.
"""
