"""From samples to one microbatch in host memory: token ids, targets, documents, positions, loss mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NoReturn

import numpy as np

from megalite.config import RunConfig
from megalite.data.fill_in_the_middle import FillInTheMiddle
from megalite.data.order.streaming import Samples
from megalite.errors import UserError


@dataclass(frozen=True, slots=True)
class SampleMicrobatch:
    """One microbatch in host memory.

    `cu_seqlens` has where each document begins in the flattened rows, and B*S; a document ends with its row at the
    latest. `positions` count from each document's first token; `loss_mask` is true where a target's loss counts. None:
    nothing asks for them.
    """

    ids: np.ndarray
    """int64 ``[B, S]``"""
    targets: np.ndarray
    """int64 ``[B, S]``"""
    cu_seqlens: np.ndarray | None = None
    """int32 ``[documents + 1]``"""
    positions: np.ndarray | None = None
    """int64 ``[B, S]``"""
    loss_mask: np.ndarray | None = None
    """bool ``[B, S]``"""
    samples: tuple[int, ...] = ()
    """The number of each row in the order that it was read from."""


@dataclass(frozen=True, slots=True)
class SampleRules:
    """What becomes of a sample on its way into a microbatch; the names are the run file's."""

    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    eod_mask_loss: bool = False
    fim: FillInTheMiddle | None = None
    seed: int = 0
    vocab_size: int | None = None
    """Of the model; None: any id is taken."""

    @classmethod
    def of(cls, config: RunConfig, fim: FillInTheMiddle | None) -> "SampleRules":
        """Return the rules that a run file states."""
        data, seed = config.data, config.run.seed
        resets = data.reset_attention_mask, data.reset_position_ids, data.eod_mask_loss
        return cls(*resets, fim, seed, config.model.vocab_size)

    def microbatch(self, samples: Samples, indices: Sequence[int]) -> SampleMicrobatch:
        """Read the samples of one microbatch and lay them out.

        Raises UserError for a token id outside the vocabulary, as in a file that was damaged.
        """
        rows = np.array(indices, dtype=np.int64)
        tokens, loss_mask = samples.tokens(rows), samples.loss_mask(rows)
        if self.vocab_size is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            row, column = np.argwhere((tokens < 0) | (tokens >= self.vocab_size))[0]
            self._refuse(samples, int(rows[row]), int(tokens[row, column]))
        if loss_mask is not None:
            loss_mask = loss_mask[:, 1:].astype(bool)
        if not (self.reset_attention_mask or self.reset_position_ids or self.eod_mask_loss or self.fim):
            return SampleMicrobatch(tokens[:, :-1], tokens[:, 1:], loss_mask=loss_mask, samples=tuple(indices))
        pieces = [[piece.length for piece in samples.pieces(int(row))] for row in rows]
        if self.fim:
            keys = (f"{self.seed} {row}".encode() for row in rows)
            tokens = np.stack(list(map(self.fim, tokens, pieces, keys)))
        lengths = tuple(_without_last_token(row) for row in pieces)
        if self.eod_mask_loss:
            loss_mask = np.ones(tokens[:, 1:].shape, bool) if loss_mask is None else loss_mask
            for row, of_sample in zip(loss_mask, pieces, strict=True):
                row[[end - 1 for end in accumulate(of_sample[:-1])]] = False
        return SampleMicrobatch(
            tokens[:, :-1],
            tokens[:, 1:],
            cu_seqlens=np.cumsum([0, *chain(*lengths)], dtype=np.int32) if self.reset_attention_mask else None,
            positions=np.stack([_positions(row) for row in lengths]) if self.reset_position_ids else None,
            loss_mask=loss_mask,
            samples=tuple(indices),
        )

    def _refuse(self, samples: Samples, sample: int, token: int) -> NoReturn:
        prefixes = sorted({str(piece.prefix) for piece in samples.pieces(sample)})
        allowed = f"a vocabulary of {self.vocab_size} allows 0 to {(self.vocab_size or 0) - 1}"
        raise UserError(
            f"{', '.join(prefixes)}: sample {sample} holds token id {token}; {allowed}; look for damage with `megalite "
            f"inspect {prefixes[0]}`"
        )


def _without_last_token(lengths: list[int]) -> tuple[int, ...]:
    """Return the documents of a sample's inputs: the last token is a target only."""
    return (*lengths[:-1], lengths[-1] - 1) if lengths[-1] > 1 else tuple(lengths[:-1])


def _positions(lengths: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([np.arange(length) for length in lengths])
