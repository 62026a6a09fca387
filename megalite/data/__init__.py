"""Text to batches: everything between a file of documents and the token ids of one training step.

::

    INPUT: jsonl, parquet, arrow, txt; files, folders, patterns
      |
      |  preprocess     (preprocessing/) shards -> token ids, in worker processes, then put together
      |     ^
      |     +---------- tokenizer (tokenizers/): sentencepiece, tokenizer.json, tiktoken;  chat: conversations
      v
    PREFIX.bin          token ids, nothing else         \\
    PREFIX.idx          where each document begins       \\  index_format says it byte for byte; writer, merge write;
    PREFIX.mask         which tokens count, of some      /  indexed, index_map read; inspection counts
    PREFIX.json         what they were made of          /
      |
      |  samples        the streaming order: sample i by arithmetic, over a permutation (permutation)
      |  megatron       Megatron-core's order, from an index that is built once (index_cache)
      |  blend          several sources as one
      v
    datasets            what a run file says: sources, split, blend, validation sets; how often each is read
      |
      |  batches        the samples of a step, this rank's share, documents and loss masks beside them, read ahead
      |  fim            fill-in-the-middle
      v
    microbatches

Whatever is written here is written beside its final name and renamed once it is whole (`files`). Whatever is
wrong with what the user gave is a `UserError` that names the file, and in text the line.
"""
