"""Text from a model: prompts to token ids, one token after the other, and back to text as they come.

- `request`: what is asked for, checked before any rank starts. No torch.
- `tokenization`, `prompts`, `detokenizer`: from text to token ids and, token by token, back.
- `sequence`: one prompt's text as it grows, and what ends it.
- `sampling`, `generator`: which token is next, and the weights that say so.
- `distributed`: the ranks that share a model.
"""
