"""Fill-in-the-middle (arXiv:2207.14255): the middle of a document moves to its end, for a model that fills in gaps.

A stretch of a document within a sample is decoded, cut at two random characters, and its parts encoded apart, since a
gap in use begins and ends within tokens. They are put together as PSM or as SPM, here in its second variant, where the
middle follows the prefix at once::

    PSM   <prefix> prefix <suffix> suffix <middle> middle
    SPM   <prefix> <suffix> suffix <middle> prefix middle

What that adds to a stretch, the suffix loses at its end, as in bigcode's Megatron-LM: stretches keep their lengths, and
with them samples and documents. As there, a stretch whose suffix is too short for it stays as it was. So does one that
would come out shorter, which bigcode fills up with padding: here padding would be learnt. So does one whose text is not
given back by its parts, such as one that begins within a character.
"""

import hashlib
import struct
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from megalite.data.tokenizers.base import Tokenizer
from megalite.data.tokenizers.inner_text import InnerText
from megalite.errors import UserError, nearest

FIM_TOKENS = (
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),
    ("<PRE>", "<MID>", "<SUF>"),
    ("\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581end\uff5c>", "<\uff5cfim\u2581hole\uff5c>"),
    ("[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
)
"""Names of the tokens before prefix, middle and suffix in known vocabularies."""


def fim_tokens(tokenizer: Tokenizer, names: Sequence[str] | None = None) -> tuple[int, int, int]:
    """Return the ids of the tokens before prefix, middle and suffix: those of `names`, or of the first known three.

    Raises UserError where the vocabulary lacks one, or two are the same.
    """
    for trio in (names,) if names else FIM_TOKENS:
        prefix, middle, suffix = map(tokenizer.token_id, trio)
        if prefix is None or middle is None or suffix is None:
            continue
        if len({prefix, middle, suffix}) < 3:
            raise UserError(f"data.fim_tokens={', '.join(trio)}: one token stands twice; name three different ones")
        return prefix, middle, suffix
    if names:
        missing = next(name for name in names if tokenizer.token_id(name) is None)
        raise UserError(
            f"data.fim_tokens: the tokenizer has no token {missing!r}{nearest(missing, tokenizer.control_tokens)}"
        )
    raise UserError(
        "data.fim_rate: the tokenizer has none of the known tokens for filling in, such as "
        f"{', '.join(FIM_TOKENS[0])}; name its own in data.fim_tokens, or leave data.fim_rate at 0"
    )


class FillInTheMiddle:
    """Rearranges with probability `rate` each stretch of a document in a sample, of these the share `spm_rate` as SPM.

    The ids are those of the tokens that stand before prefix, middle and suffix.
    """

    def __init__(
        self, rate: float, spm_rate: float, prefix_id: int, middle_id: int, suffix_id: int, tokenizer: Tokenizer
    ) -> None:
        self._rate, self._spm_rate = rate, spm_rate
        self._prefix_id, self._middle_id, self._suffix_id = prefix_id, middle_id, suffix_id
        control_ids = {*tokenizer.control_tokens.values(), prefix_id, middle_id, suffix_id}
        if tokenizer.eod_id is not None:
            control_ids.add(tokenizer.eod_id)
        self._control_ids = np.array(sorted(control_ids), dtype=np.int64)
        self._inner = InnerText(tokenizer)

    def __call__(self, tokens: np.ndarray, lengths: Sequence[int], key: bytes | int) -> np.ndarray:
        """Return the sample int64 ``[S + 1]`` with its stretches, of `lengths`, rearranged as `key` decides.

        Control tokens at a stretch's ends, such as the end of the document, stay there. Raises ValueError where the
        lengths do not sum to S + 1.
        """
        if sum(lengths) != len(tokens):
            raise ValueError(f"stretches of {sum(lengths)} tokens in a sample of {len(tokens)}")
        sample = tokens.copy()
        salt = key if isinstance(key, bytes) else b"%d" % key
        for number, end in enumerate(accumulate(lengths)):
            chosen, *draws = _draws(salt, number)
            if chosen < self._rate:
                self._rearrange(sample[end - lengths[number] : end], draws)
        return sample

    def _rearrange(self, stretch: np.ndarray, draws: Sequence[float]) -> None:
        is_control = np.isin(stretch, self._control_ids)
        of_text = np.flatnonzero(~is_control)
        if len(of_text) == 0:
            return
        body = slice(of_text[0], of_text[-1] + 1)
        if is_control[body].any():  # it has no text, and would be lost
            return
        parts = self._cut(stretch[body].tolist(), draws[1:])
        if parts is None:
            return
        prefix, middle, suffix = parts
        excess = len(prefix) + len(middle) + len(suffix) + 3 - len(stretch[body])
        if excess < 0 or len(suffix) <= excess:
            return
        suffix = suffix[: len(suffix) - excess]
        if draws[0] < self._spm_rate:
            stretch[body] = [self._prefix_id, self._suffix_id, *suffix, self._middle_id, *prefix, *middle]
        else:
            stretch[body] = [self._prefix_id, *prefix, self._suffix_id, *suffix, self._middle_id, *middle]

    def _cut(self, body: list[int], draws: Sequence[float]) -> tuple[list[int], list[int], list[int]] | None:
        """Encode the three parts of a text cut at two places; None where they would not give the text back."""
        text = self._inner.decode(body)
        if text is None:
            return None
        start, end = sorted(int(draw * (len(text) + 1)) for draw in draws)
        prefix, middle, suffix = map(self._inner.encode, (text[:start], text[start:end], text[end:]))
        # No normaliser has changed it, and nothing has joined with a mark.
        return (prefix, middle, suffix) if self._inner.decode(prefix + middle + suffix) == text else None


def _draws(salt: bytes, number: int) -> list[float]:
    """Four numbers in [0, 1) for a stretch, the same wherever and whenever they are drawn."""
    digest = hashlib.blake2b(salt, digest_size=32, salt=number.to_bytes(16, "little")).digest()
    return [(word >> 11) * 2.0**-53 for word in struct.unpack("<4Q", digest)]
