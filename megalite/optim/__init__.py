"""Optimization: the optimizers and what each declares, parameter groups, learning-rate schedules, a step's outcome.

An optimizer is one file with its `OptimizerDeclaration` and one line in `registry.OPTIMIZERS`. The run file, the
engines, checkpoints, resuming, the parity check and the estimates of memory and disk space follow from the
declaration.
"""
