"""Keys of the DeepSpeed JSON that state which activations a backward computes anew."""

NUMBER_CHECKPOINTS = "activation_checkpointing.number_checkpoints"
CHECKPOINT_INTERVAL = "pipeline.activation_checkpoint_interval"
