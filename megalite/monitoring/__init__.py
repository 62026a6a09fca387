"""What is measured and shown of a run: metrics, devices, heartbeats, stragglers, state, pictures. No engine."""
