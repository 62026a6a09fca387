"""The DeepSpeed JSON, one input format of the configuration: every key is honoured, derived, left out or refused.

DeepSpeed itself ignores a misspelt key in silence (``gradient_cliping``); here a key outside the table is an error
that names its nearest neighbour. The document that results is plain JSON: `DeepSpeedSettings.engine_config` is what
``deepspeed.initialize`` is given.

`rules` says what may become of a key, `table` lists every key with its rule, `parse` reads a document against the
table, `settings` completes the result from the run, `defaults` writes out what DeepSpeed takes where a JSON is silent.
"""
