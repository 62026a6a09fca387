"""A tokenized corpus in Megatron's format (`format`), memory-mapped and read."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from megalite.data.indexed.format import BLOCK, DatasetSidecar, with_suffix
from megalite.data.indexed.index import MappedIndex, map_file
from megalite.errors import UserError, did_you_mean


class IndexedDataset:
    """A tokenized corpus, memory-mapped; opened in constant time and memory (`verify` is the full check).

    Its documents are stretches of one stream of tokens; each consists of sequences, in what megalite writes of one.
    Raises UserError, naming the file, what was found and what was expected, on opening and on reading.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.index_path = with_suffix(prefix, ".idx")
        self.tokens_path = with_suffix(prefix, ".bin")
        self.mask_path = with_suffix(prefix, ".mask")
        for path in (self.index_path, self.tokens_path):
            if not path.is_file():
                raise UserError(f"{path}: no such file{_fix_for_missing(prefix)}")
        self._index = MappedIndex(self.index_path)
        self.dtype, self.modes = self._index.dtype, self._index.modes
        self.num_sequences, self.num_documents = self._index.num_sequences, self._index.num_documents
        self.num_tokens = self._index.num_tokens
        self._check_file(self.tokens_path, self.num_tokens * self.dtype.itemsize)
        self._tokens = map_file(self.tokens_path, self.dtype)
        self.has_loss_mask = self.mask_path.is_file()
        if self.has_loss_mask:
            self._check_file(self.mask_path, self.num_tokens)
        self._mask = map_file(self.mask_path, np.dtype("u1")) if self.has_loss_mask else None
        self.sidecar = self._read_sidecar()
        if self.sidecar is not None and self.num_sequences == self.num_documents:
            # megalite writes one sequence a document, and a sidecar says that it wrote this.
            self._index.require_one_sequence_a_document()

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Check the whole index, the loss mask, and what the sidecar says of both files' contents.

        `progress` is told how much is done and how much there is. Raises UserError at the first fault.
        """
        masked = self.num_tokens if self.has_loss_mask else 0
        told = self.sidecar.sha256 if self.sidecar is not None else {}
        digests = {suffix: told[suffix] for suffix in (".bin", ".mask") if suffix in told}
        hashed = [with_suffix(self.prefix, suffix) for suffix in digests]
        total = (
            self.num_sequences
            + self.num_documents
            + 1
            + masked
            + sum(path.stat().st_size for path in hashed if path.exists())
        )
        done = 0
        for count in self._steps_of_verify(digests):
            done += count
            if progress is not None:
                progress(done, total)

    def _steps_of_verify(self, digests: Mapping[str, str]) -> Iterator[int]:
        yield from self._index.check(whole=True)
        yield from self._check_mask()
        if ".bin" not in digests:
            for at in range(0, self.num_tokens, 16 * BLOCK):
                self.tokens(at, min(16 * BLOCK, self.num_tokens - at))
                yield 0
        for suffix, expected in digests.items():
            path, digest = with_suffix(self.prefix, suffix), hashlib.sha256()
            if not path.is_file():
                raise UserError(f"{path}: no such file, but the sidecar tells its SHA-256; copy it too")
            with path.open("rb") as file:
                while part := file.read(16 * BLOCK):
                    digest.update(part)
                    yield len(part)
            if digest.hexdigest() != expected:
                raise UserError(
                    f"{path}: has SHA-256 {digest.hexdigest()[:12]}, but was written with {expected[:12]}; copy it "
                    "again, or preprocess again"
                )

    def document_span(self, document: int) -> tuple[int, int]:
        """Return a document's first token and its end; raise IndexError outside ``0 <= document < num_documents``."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} is not in 0..{self.num_documents - 1}")
        start, stop = self._index.document_starts(range(document, document + 2)).tolist()
        return start, stop

    def document_at(self, token: int) -> int:
        """Return the document that holds this token; raise IndexError outside ``0 <= token < num_tokens``.

        Documents without tokens hold none. Bisects in the mapped index.
        """
        if not 0 <= token < self.num_tokens:
            raise IndexError(f"token {token} is not in 0..{self.num_tokens - 1}")
        return self._index.document_at(token)

    def document_lengths(self, documents: range) -> np.ndarray:
        """Return the tokens of each of some neighbouring documents: int32[len(documents)].

        Raises IndexError beyond ``0..num_documents``.
        """
        if documents.step != 1 or not 0 <= documents.start <= documents.stop <= self.num_documents:
            raise IndexError(f"{documents} is not in 0..{self.num_documents}, one by one")
        lengths = np.diff(self._index.document_starts(range(documents.start, documents.stop + 1)))
        if len(lengths) and lengths.max() > np.iinfo(np.int32).max:
            raise self._index.broken(
                f"document {documents[lengths.argmax()]} has {lengths.max()} tokens, over 2^31 - 1"
            )
        return lengths.astype(np.int32)

    def document_tokens(self, document: int) -> np.ndarray:
        """Return a view of one document's tokens; raise IndexError outside ``0 <= document < num_documents``."""
        start, stop = self.document_span(document)
        return self._checked_ids(self._tokens[start:stop])

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Return a view of `length` tokens of the stream from `start` on; raise IndexError beyond its ends."""
        self._require_inside(start, length)
        return self._checked_ids(self._tokens[start : start + length])

    def loss_mask(self, start: int, length: int) -> np.ndarray:
        """Return a view of the loss mask, uint8[length]: 1 where a token is a target that counts.

        Raises IndexError beyond the ends of the stream, ValueError without a mask (`has_loss_mask`).
        """
        self._require_inside(start, length)
        return self._checked_mask(self._stream(masked=True)[start : start + length])

    def windows(self, starts: np.ndarray, length: int, *, masked: bool = False) -> np.ndarray:
        """Copy stretches of one length from anywhere in the stream: int64[n] to int64[n, length].

        With `masked` it is their loss mask, uint8[n, length]. Raises IndexError beyond the ends of the stream.
        """
        if not len(starts):
            return np.empty((0, length), np.uint8 if masked else np.int64)
        self._require_inside(int(starts.min()), 0)
        self._require_inside(int(starts.max()), length)
        rows = np.lib.stride_tricks.sliding_window_view(self._stream(masked), length)[starts]
        return self._checked_mask(rows) if masked else self._checked_ids(rows).astype(np.int64)

    def stretches(self, starts: np.ndarray, lengths: np.ndarray, *, masked: bool = False) -> np.ndarray:
        """Copy stretches of any lengths, one behind the other: int64[n], int64[n] to int64[sum(lengths)].

        With `masked` it is their loss mask, uint8. Raises IndexError beyond the ends of the stream.
        """
        joined = np.empty(int(lengths.sum()), np.uint8 if masked else np.int64)
        if len(starts):
            if starts.min() < 0 or lengths.min() < 0 or (starts + lengths).max() > self.num_tokens:
                raise IndexError(f"stretches are not all in 0..{self.num_tokens}")
            stream = self._stream(masked)
            ends = (starts + lengths).tolist()
            np.concatenate([stream[a:b] for a, b in zip(starts.tolist(), ends, strict=True)], out=joined)
        return self._checked_mask(joined) if masked else self._checked_ids(joined)

    def sequence_lengths(self, sequences: range) -> np.ndarray:
        """Return the tokens of each of some neighbouring sequences: int32[len(sequences)], as the index has them."""
        return self._index.sequence_lengths(sequences)

    def sequence_spans(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where in the stream each of some sequences begins, and its length: int64[n] to two of int64[n]."""
        return self._index.sequence_spans(sequences)

    def require_sound_mask(self) -> None:
        """Raise UserError where the loss mask, if there is one, holds anything but 0 and 1; reads it all."""
        for _ in self._check_mask():
            pass

    def _check_mask(self) -> Iterator[int]:
        for at in range(0, self.num_tokens if self.has_loss_mask else 0, BLOCK):
            yield len(self.loss_mask(at, min(BLOCK, self.num_tokens - at)))

    def max_token_id(self) -> int:
        """Return the largest token id, or -1 without tokens: from the sidecar, else by reading every token.

        Raises UserError where it reads one below 0.
        """
        if self.sidecar is not None:
            return self.sidecar.max_token_id
        blocks = range(0, self.num_tokens, 64 * BLOCK)
        return max((int(self._checked_ids(self._tokens[at : at + 64 * BLOCK]).max()) for at in blocks), default=-1)

    def require_vocabulary(self, vocab_size: int) -> None:
        """Raise UserError where a token id lies beyond a vocabulary."""
        largest = self.max_token_id()
        if largest >= vocab_size:
            raise UserError(
                f"{self.tokens_path}: holds token id {largest}; a vocabulary of {vocab_size} allows 0 to "
                f"{vocab_size - 1}; preprocess the text with the model's own tokenizer"
            )

    def _require_inside(self, start: int, length: int) -> None:
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(f"tokens {start}..{start + length} are not in 0..{self.num_tokens}")

    def _stream(self, masked: bool) -> np.ndarray:
        if not masked:
            return self._tokens
        if self._mask is None:
            raise ValueError(f"{self.prefix} has no loss mask")
        return self._mask

    def _checked_ids(self, tokens: np.ndarray) -> np.ndarray:
        """Return token ids that were read; raise UserError for one below 0, or above what the sidecar tells."""
        if not tokens.size:
            return tokens
        least = int(tokens.min()) if self.dtype.kind == "i" else 0
        if least < 0:
            raise UserError(
                f"{self.tokens_path}: holds token id {least}; ids are 0 and more; copy it again, or preprocess again"
            )
        if self.sidecar is not None and (most := int(tokens.max())) > self.sidecar.max_token_id:
            raise UserError(
                f"{self.tokens_path}: holds token id {most}; its sidecar tells {self.sidecar.max_token_id} as the "
                "largest; copy it again, or preprocess again"
            )
        return tokens

    def _checked_mask(self, mask: np.ndarray) -> np.ndarray:
        if mask.size and mask.max() > 1:
            raise UserError(f"{self.mask_path}: holds {mask.max()}; a loss mask holds 0 and 1; preprocess again")
        return mask

    def _check_file(self, path: Path, expected: int) -> None:
        found = path.stat().st_size
        if found != expected:
            state = "cut short" if found < expected else "too long"
            raise UserError(
                f"{path}: {found} bytes found, {state}; {self.index_path.name} describes {expected}; "
                "copy it again or preprocess again"
            )

    def _read_sidecar(self) -> DatasetSidecar | None:
        path = with_suffix(self.prefix, ".json")
        if not path.is_file():
            return None
        # Not before a sidecar is read: preprocess reads none.
        from pydantic import TypeAdapter, ValidationError

        from megalite.settings.validation import validation_lines

        try:
            sidecar = TypeAdapter(DatasetSidecar).validate_json(path.read_bytes())
        except ValidationError as error:
            wrong = "; ".join(validation_lines(error))
            raise UserError(f"{path}: {wrong}; remove it, or preprocess again") from error
        if (sidecar.num_tokens, sidecar.num_documents) != (self.num_tokens, self.num_documents):
            raise UserError(
                f"{path}: describes {sidecar.num_documents} documents and {sidecar.num_tokens} tokens; "
                f"{self.index_path.name} has {self.num_documents} and {self.num_tokens}; remove it, or preprocess again"
            )
        if problem := _impossible(sidecar):
            raise UserError(f"{path}: {problem}; remove it, or preprocess again")
        if sidecar.max_token_id > np.iinfo(self.dtype).max:
            raise UserError(
                f"{path}: describes token id {sidecar.max_token_id}; {self.index_path.name} says {self.dtype}, which "
                f"holds up to {np.iinfo(self.dtype).max}; remove it, or preprocess again"
            )
        return sidecar


def _impossible(sidecar: DatasetSidecar) -> str | None:
    """Return what a sidecar says that cannot be."""
    size, entropy = sidecar.vocab_size, sidecar.token_counts_entropy
    if size < 1:
        return f"vocab_size={size} found; a vocabulary has 1 id or more"
    for name in ("max_token_id", "eod_id", "bos_id"):
        token, least = getattr(sidecar, name), -1 if name == "max_token_id" and not sidecar.num_tokens else 0
        if token is not None and not least <= token < size:
            return f"{name}={token} found; ids of vocab_size={size} are 0 to {size - 1}"
    if not 0 <= entropy <= math.log(size) + 1e-6:
        return f"token_counts_entropy={entropy} found; of vocab_size={size} it is 0 to {math.log(size):.4f} nats"
    for name in ("skipped", "empty", "short", "duplicates"):
        if getattr(sidecar, name) < 0:
            return f"{name}={getattr(sidecar, name)} found; a count is 0 or more"
    return None


def _fix_for_missing(prefix: Path) -> str:
    if prefix.suffix in (".bin", ".idx"):
        return f"; a prefix has no {prefix.suffix}, use {prefix.with_suffix('')}"
    for there, missing in ((".bin", ".idx"), (".idx", ".bin")):
        if with_suffix(prefix, there).is_file():
            return (
                f", though {prefix.name}{there} is there; copy {prefix.name}{missing} beside it, or preprocess the "
                "text again"
            )
    datasets = [path.with_suffix("").name for path in prefix.parent.glob("*.idx")]
    if prefix.name not in datasets and (near := did_you_mean(prefix.name, datasets)):
        return near
    return f"; make the dataset with `megalite preprocess INPUT --output {prefix}`"
