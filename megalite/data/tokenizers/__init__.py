"""The kinds of tokenizers that `load` finds, and what they share: control tokens, text without edges."""
