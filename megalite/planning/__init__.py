"""What a run will need, found before it starts: resolved settings, checks, memory, its start, and what its steps read.

`plan` resolves a run file, and `preflight` checks it against machine, data and checkpoints. `start` decides where the
training starts, for the ranks and for the dry run (`preview`). `description` prints a plan. Nothing here needs a
process group, an accelerator or DeepSpeed.
"""
