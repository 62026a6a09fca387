"""Observation of a run: metrics, devices, heartbeats, stragglers, state, plots. No module here imports an engine."""
