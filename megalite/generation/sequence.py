"""One prompt's text as it grows, and what ends it."""

from random import Random
from typing import Any, Literal

from megalite.generation.detokenizer import StopTexts, TextStream
from megalite.generation.request import Job

Reason = Literal["end", "stop", "length", "positions"]
"""Why a text ended: the vocabulary's end, a stop text, `max_new_tokens`, the model's `max_position_embeddings`."""


class Continuation:
    """What follows prompt `number`, from 0, of a job.

    Its random numbers follow from the seed and the number alone, so that no text depends on the prompts beside it.
    """

    def __init__(self, job: Job, number: int) -> None:
        self.number, self.prompt, self.prompt_ids = number, job.prompts[number], job.prompt_ids[number]
        self.draws = Random(f"{job.sampling.seed}/{number}")
        self.tokens: list[int] = []
        """Every token that was chosen, one that ends the text included."""
        self.text = ""
        self.reason: Reason | None = None
        self.seconds = 0.0
        """From the start of its batch to its end."""
        vocabulary, stops = job.vocabulary, job.limits.stops
        control = {name: vocabulary.control_token(name) for name in stops}
        self._stop_tokens = frozenset(control.values()) - {None}
        self._ends = vocabulary.ends
        self._stream = TextStream(vocabulary.decode, self.prompt_ids)
        self._stops = StopTexts([text for text in stops if control[text] is None])
        self._room = job.weights.model.max_position_embeddings - len(self.prompt_ids)
        self._most = job.limits.max_new_tokens

    def take(self, token: int) -> str:
        """Add a token; return the text that is certain by now. `reason` is set where it was the last."""
        self.tokens.append(token)
        piece = ""
        if token in self._stop_tokens:
            self.reason = "stop"
        elif token in self._ends:
            self.reason = "end"
        else:
            piece = self._stops.feed(self._stream.feed(token))
            self.reason = "stop" if self._stops.found else self._full()
        if self.reason is not None and not self._stops.found:
            piece += self._rest()
        self.text += piece
        return piece

    def record(self) -> dict[str, Any]:
        """Return what is told of it as JSON."""
        return {
            "prompt": self.prompt.text,
            "text": self.text,
            "prompt_tokens": len(self.prompt_ids),
            "tokens": len(self.tokens),
            "reason": self.reason,
            "tokens_per_second": round(len(self.tokens) / max(self.seconds, 1e-9), 1),
        }

    def _full(self) -> Reason | None:
        if len(self.tokens) >= self._most:
            return "length"
        return "positions" if len(self.tokens) >= self._room else None

    def _rest(self) -> str:
        """Return what was held back; a stop text may still show in it."""
        piece = self._stops.feed(self._stream.finish())
        if self._stops.found:
            self.reason = "stop"
            return piece
        return piece + self._stops.finish()
