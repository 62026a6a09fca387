"""Hugging Face's ``tokenizer.json``, through the `tokenizers` library."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from megalite.data.tokenizers.control_tokens import (
    BEGINNING_NAMES,
    END_OF_DOCUMENT_NAMES,
    PlainText,
    TextRefused,
    looks_like_control,
    refusals_named,
)


class HuggingFaceTokenizer:
    """A ``tokenizer.json``; in `encode` its control tokens are read in text, as the library does."""

    def __init__(self, data: bytes) -> None:
        import tokenizers

        data_text = data.decode("utf-8-sig")
        self._tokenizer = _bare(tokenizers.Tokenizer.from_str(data_text))
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        # Ids may have gaps, so the number of entries does not bound them.
        self.vocab_size = max(self._vocabulary.values()) + 1
        self.eod_id = next((self._vocabulary[name] for name in END_OF_DOCUMENT_NAMES if name in self._vocabulary), None)
        self.digest = hashlib.sha256(data).hexdigest()
        self._content: dict[str, Any] = json.loads(data_text)
        # The library passes over an added token without a name.
        added = [token for token in self._content.get("added_tokens") or [] if token["content"] in self._vocabulary]
        # Runs of spaces are added tokens too, but no control tokens.
        visible = [token for token in added if token["content"].strip()]
        self._special = {token["content"] for token in visible if token.get("special", False)}
        # Of an added token the library makes its own id, whatever the file says, and texts are encoded with that.
        self.control_tokens: dict[str, int] = {
            token["content"]: self._vocabulary[token["content"]]
            for token in visible
            if token["content"] in self._special or looks_like_control(token["content"])
        }
        self.notes = tuple(
            f"the file gives {token['content']!r} the id {token['id']}, the tokenizers library "
            f"{self._vocabulary[token['content']]}, which counts here as in transformers"
            for token in added
            if token["id"] != self._vocabulary[token["content"]]
        )
        self.leading_id = self._leading()
        named = (self.control_tokens[name] for name in BEGINNING_NAMES if name in self.control_tokens)
        self.bos_id = self.leading_id if self.leading_id is not None else next(named, None)
        self.unknown_id = self._unknown()
        self._encoders: dict[frozenset[str], PlainText] = {}
        self._plain = self._without(self.control_tokens)

    def token_id(self, name: str) -> int | None:
        """Return the id of a piece or control token by its exact name."""
        return self._vocabulary.get(name)

    def token_name(self, token: int) -> str | None:
        """Return the name of a piece or control token by its id."""
        return self._tokenizer.id_to_token(token)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with no token added before or after."""
        with refusals_named():
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_plain(self, text: str) -> list[int]:
        """Return the token ids of a text in which names of control tokens stay text."""
        return self._plain(text)

    def message_encoder(self, names: Iterable[str]) -> Callable[[str], list[int]]:
        """Return an encoder of messages: of the added tokens it reads those that neither are special nor in `names`."""
        return self._without({*self._special, *END_OF_DOCUMENT_NAMES, *names})

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        with refusals_named():
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text as int32[tokens]."""
        return [np.array(ids, dtype=np.int32) for ids in self.encode_batch(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; control tokens have none."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _leading(self) -> int | None:
        """Return what the post-processor puts before a text, where that is one token."""
        if not self._content.get("post_processor"):
            return None
        for letter in ("a", " "):
            try:
                with refusals_named():
                    bare, dressed = (
                        self._tokenizer.encode(letter, add_special_tokens=added).ids for added in (False, True)
                    )
            except TextRefused:
                continue
            starts = (at for at in range(len(dressed)) if bare and dressed[at : at + len(bare)] == bare)
            if (start := next(starts, None)) is not None:
                return dressed[0] if start == 1 else None
        return None

    def _unknown(self) -> int | None:
        model = self._content.get("model") or {}
        name, token = model.get("unk_token"), model.get("unk_id")
        return self._vocabulary.get(name) if isinstance(name, str) else token if isinstance(token, int) else None

    def _without(self, names: Iterable[str]) -> PlainText:
        """Return an encoder of texts in which these names stay text."""
        import tokenizers

        ids = {name: self._vocabulary[name] for name in names if name in self._vocabulary}
        key = frozenset(ids)
        if key not in self._encoders:
            added = [{**token, "special": token["content"] in ids} for token in self._content.get("added_tokens") or []]
            plain = _bare(tokenizers.Tokenizer.from_str(json.dumps({**self._content, "added_tokens": added})))
            plain.encode_special_tokens = True

            def encode(text: str) -> list[int]:
                with refusals_named():
                    return plain.encode(text, add_special_tokens=False).ids

            self._encoders[key] = PlainText(encode, ids)
        return self._encoders[key]


def _bare(tokenizer: Any) -> Any:
    """Return a tokenizer that neither cuts nor fills documents, which its file may ask for."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
