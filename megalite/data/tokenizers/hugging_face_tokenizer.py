"""Hugging Face's ``tokenizer.json``, through the `tokenizers` library."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from megalite.data.tokenizers.control_tokens import END_OF_DOCUMENT_NAMES, PlainText, looks_like_control


class HuggingFaceTokenizer:
    """A ``tokenizer.json``; in `encode` its control tokens are read in text, as the library does."""

    def __init__(self, data: bytes) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_str(data.decode())
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        # Ids may have gaps, so the number of entries does not bound them.
        self.vocab_size = max(self._vocabulary.values()) + 1
        self.eod_id = next((self._vocabulary[name] for name in END_OF_DOCUMENT_NAMES if name in self._vocabulary), None)
        self.digest = hashlib.sha256(data).hexdigest()
        content = json.loads(data)
        added = content.get("added_tokens") or []
        for token in added:
            name = token["content"]
            # Runs of spaces are added tokens too, but no control tokens.
            token["special"] = bool(name.strip()) and (token.get("special", False) or looks_like_control(name))
        self.control_tokens: dict[str, int] = {token["content"]: token["id"] for token in added if token["special"]}
        plain = tokenizers.Tokenizer.from_str(json.dumps(content))
        plain.encode_special_tokens = True  # pyright: ignore[reportAttributeAccessIssue] (missing in the stubs)
        for tokenizer in (self._tokenizer, plain):
            # A file may ask for both, which would cut or fill documents in silence.
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._plain = PlainText(lambda text: plain.encode(text, add_special_tokens=False).ids, self.control_tokens)

    def token_id(self, name: str) -> int | None:
        """Return the id of a piece or control token by its exact name."""
        return self._vocabulary.get(name)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with no token added before or after."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_plain(self, text: str) -> list[int]:
        """Return the token ids of a text in which names of control tokens stay text."""
        return self._plain(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text as int32[tokens]."""
        return [np.array(ids, dtype=np.int32) for ids in self.encode_batch(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; control tokens have none."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)
