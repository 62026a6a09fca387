"""Checkpoints of Megatron-LM and Megatron-DeepSpeed, read as weights by their global names.

::

    iter_N/mp_rank_TT[_PPP]/model_optim_rng.pt       global_stepN/mp_rank_TT_model_states.pt, layer_LL-model_TT-...pt
          \\                                            /
           torch_file    tensors mapped from disk and plain data, nothing else; the one place that reads torch's files
           state_dict    what the files hold, under one set of names, whatever stage or naming scheme it came from
           model_args    the options of the run that wrote it -> the section `model`
           tp_shards     where a box of a global tensor lies in the shards of the tensor ranks
           reader        `MegatronWeights`: all of it behind one face

Nothing here imports torch before a checkpoint is opened.
"""
