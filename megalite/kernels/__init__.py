"""Which implementation computes matrix products and attention on this device: types, and the measurement."""
