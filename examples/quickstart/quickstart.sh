#!/bin/sh
# From text to a trained model, its pictures and its first words. `make quickstart` runs this; every line works by hand as well.
set -eu

say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

# 1. Real English text: the documentation that Python ships with itself. One JSON object a line: {"text": ...}.
say python examples/quickstart/build_corpus.py --output data/quickstart/corpus.jsonl

# 2. A vocabulary learned from that text.
say megalite tokenizer train data/quickstart/corpus.jsonl --vocab-size 8192 --output data/quickstart/tokenizer.model --force

# 3. Text to token ids, in Megatron's memory-mapped format: data/quickstart/corpus.bin and corpus.idx.
say megalite preprocess data/quickstart/corpus.jsonl --tokenizer data/quickstart/tokenizer.model \
    --output data/quickstart/corpus --append-eod --workers 2 --force

# 4. What is about to run: which rank holds what, and how well the pipeline will be filled.
say megalite train examples/quickstart/run.yaml --dry-run

# 5. Train on four processes. Each is one rank of tensor 2 x pipeline 2.
say megalite train examples/quickstart/run.yaml

# 6. What the model has learned to say. A temperature of 0 takes the likeliest token each time.
say megalite generate runs/quickstart --prompt "Return the" --max-new-tokens 40 --temperature 0
