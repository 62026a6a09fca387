"""One training run: its plan and checks, the assembly of its parts, the training loop, and its guards.

`plan` checks a run before any rank starts; `train` initialises a rank and runs it; `trainer` holds the training loop.
`resume` decides where training starts, `checkpointing` saves, `run_logger` writes the files of the run's folder.
`loss_spikes`, `nonfinite` and `stop_requests` can end the run, skip a step or roll it back.
"""
