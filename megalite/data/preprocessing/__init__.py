"""The parts of `megalite.data.preprocess`, from files of text to shards of token ids.

::

    inputs        files, cut into shards that any process can read on its own
    arrays        a JSON array as lines
    readers       the documents of a shard, with their places; tables (parquet, arrow), zstd, long_text, places help
    encoding      a shard's documents to files of token ids; duplicates finds equal ones
    workers       shards over processes, and an end that leaves none behind
    work_folder   what is finished so far, for the next run to go on from
    assembly      the shards put together, in order or shuffled
"""
