"""Small tokenizers of every kind, trained on the spot, with control tokens of the test's choice."""

import io
import json
from collections.abc import Sequence
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megalite.data.tokenizers.base import Tokenizer as TokenizerProtocol
from megalite.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megalite.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

EOD = "<|endoftext|>"
KINDS = ("sentencepiece", "unigram", "byte-level", "metaspace")
IDENTITY: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "model_type": "bpe",
}


def train_tokenizer(kind: str, texts: Sequence[str], control_tokens: Sequence[str]) -> TokenizerProtocol:
    """Return a tokenizer of one of `KINDS` that gives every text back."""
    if kind == "sentencepiece":
        return train_sentencepiece(texts, control_tokens, **IDENTITY)
    if kind == "unigram":
        return train_sentencepiece(texts, control_tokens, **IDENTITY | {"model_type": "unigram"})
    return train_hugging_face(texts, control_tokens, metaspace=kind == "metaspace")


def train_hugging_face(texts: Sequence[str], control_tokens: Sequence[str], *, metaspace: bool) -> HuggingFaceTokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=metaspace, unk_token=None))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if metaspace:  # as Llama's
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue] (stubs lack setters)
        tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
        tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=[EOD, *control_tokens, *(alphabet if metaspace else ())],
        initial_alphabet=[] if metaspace else alphabet,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in (EOD, *control_tokens)])
    content = json.loads(tokenizer.to_str())
    # The trainer knows no other way to a vocabulary that has the bytes.
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in alphabet]
    return HuggingFaceTokenizer(json.dumps(content).encode())


def train_sentencepiece(texts: Sequence[str], control_tokens: Sequence[str], **options: Any) -> SentencePieceTokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=500,
        byte_fallback=True,
        hard_vocab_limit=False,
        eos_piece=EOD,
        control_symbols=list(control_tokens),
        minloglevel=2,
        **options,
    )
    return SentencePieceTokenizer(model.getvalue())
