"""Hugging Face's folders, in and out.

::

    config.json   <---- config           settings ---->   ModelConfig
    tensors       <---- tensor_map       modules  ---->   weights by global names
    tokenizer     <---- tokenizer_files                   the tokenizer's file

Each model family states once what its models are called there (`model.formats.hugging_face`). That is read both ways:
`reader` finds any box of a weight of ours through it, `writer` makes their tensors. No code of a folder's own is ever
run; torch's files are read as plain tensors alone.
"""
