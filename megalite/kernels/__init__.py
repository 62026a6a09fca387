"""Kernel selection: which implementation computes matrix products and attention on a device, and its measurement."""
