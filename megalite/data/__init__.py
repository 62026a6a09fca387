"""Text to samples: everything between a file of documents and the token ids of one training sample.

::

    INPUT: jsonl, jsonl.gz, txt; files or folders
      |
      |  inputs       the files, cut at line ends into chunks that any process can read on its own
      |     |
      |     +-------> tokenizer.train_sentencepiece ----> tok.model
      |                                                      |
      |  preprocess   chunks -> token ids, in worker <-------+  tokenizer.load_tokenizer
      |               processes, back in the order of the input
      v
    PREFIX.bin        token ids, nothing else  \\
    PREFIX.idx        where each one begins     >  indexed (Megatron's format, byte for byte)
    PREFIX.json       what they were made of   /
      |
      |  samples      split_documents: the documents for training, the documents for validation
      |               GPTDataset:      sample i, a function of (seed, i) alone; int64[sequence_length + 1]
      v
    microbatches

Whatever is written here is written beside its final name and renamed once it is whole (`files`). Whatever is
wrong with what the user gave is a `UserError` that names the file, and in text the line.
"""
