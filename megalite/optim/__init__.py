"""Optimization: AdamW over a rank's parameters, learning-rate schedules, and the outcome of an optimizer step."""
