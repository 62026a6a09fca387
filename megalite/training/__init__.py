"""One run: what is planned and checked before it, how its parts are assembled, the loop, and what guards it.

`plan` checks a run before a rank starts; `train` brings the ranks together; `trainer` is the loop. `resume` decides
where training begins, `checkpointing` when and how it saves, `run_logger` what it leaves in its folder; `loss_spikes`,
`nonfinite` and `stop_requests` can end or redirect it.
"""
