"""Text to batches: everything between a file of documents and the token ids of one training step.

::

    INPUT: jsonl, parquet, arrow, txt; files, folders, patterns
      |
      |  preprocess/    shards -> token ids, in worker processes, then put together
      |     ^
      |     +---------- tokenizers/: sentencepiece, tokenizer.json, tiktoken;  chat/: conversations
      v
    PREFIX.bin          token ids, nothing else         \\
    PREFIX.idx          where each document begins       \\  indexed/: format, byte for byte; writer, merge write;
    PREFIX.mask         which tokens count, of some      /  dataset, index read; statistics counts
    PREFIX.json         what they were made of          /
      |
      |  order/         which sample comes when
      |    streaming    sample i by arithmetic, over a permutation (permutation)
      |    megatron     Megatron-core's order, from an index that is built once (index_cache)
      |    blend        several sources as one
      v
    datasets            what a run file says: sources, split, blend, validation sets; how often each is read
      |
      |  batch_schedule the samples of a step
      |  batch_reader   this rank's share of them; prefetch reads it ahead
      |  collate        documents, positions and loss masks beside the tokens
      |  fill_in_the_middle
      v
    microbatches

Whatever is written here is written beside its final name and renamed once it is whole (`files`). Whatever is
wrong with what the user gave is a `UserError` that names the file, and in text the line.
"""
