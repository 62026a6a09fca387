"""Kernels: the choice of implementations of matrix products and attention, and counter-based random numbers."""
