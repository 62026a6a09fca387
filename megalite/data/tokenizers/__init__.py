"""The kinds of tokenizers behind `megalite.data.tokenizer`, and what they share: control tokens, text without edges."""
