"""The Transformer: `transformer` holds its blocks, read top to bottom like the papers; `stage` cuts it in stages."""
