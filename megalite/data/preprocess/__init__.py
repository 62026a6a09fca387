"""The parts of `megalite.data.preprocess.preprocess`, from files of text to shards of token ids.

::

    inputs           files, cut into shards that any process can read on its own
    json_arrays      a JSON array as lines
    readers          the documents of a shard, with their places (source_location); arrow_tables (parquet, arrow), zstd,
                     long_text help
    encode_shard     a shard's documents to files of token ids; deduplicate finds equal ones
    workers          shards over processes, and an end that leaves none behind
    work_folder      what is finished so far, for the next run to go on from
    merge_shards     the shards put together, in order or shuffled
"""
