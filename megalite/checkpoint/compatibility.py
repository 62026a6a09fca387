"""Whether a checkpoint, or other weights, fit a run: its model, its shapes, its tokenizer."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from megalite.checkpoint.manifest import MOMENTS
from megalite.checkpoint.mismatch_table import difference_table, shape_differences
from megalite.checkpoint.reader import CheckpointReader
from megalite.checkpoint.weights import WEIGHT, CheckpointWeights
from megalite.config import ModelConfig, read_model
from megalite.errors import UserError
from megalite.model.weights import Weights

_HEADINGS = "the run file asks", "it holds"
_NOT_OF_THE_FUNCTION = ("attention_dropout", "hidden_dropout", "initializer_range")


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a run asks of a checkpoint: its model, the global shapes of its weights, its tokenizer."""

    model: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    tokenizer_sha256: str | None

    def require_resumable(self, reader: CheckpointReader) -> None:
        """Raise UserError, with a table of the differences, where a checkpoint is not one of this run."""
        if not any(name.startswith(MOMENTS) for name in reader.manifest.tensors):
            raise UserError(
                f"{reader.folder}: holds weights alone, with which no run goes on; begin with init_from={reader.folder}"
            )
        rows = list(self._model_rows(dict(reader.manifest.model)))
        # What is wrong with the weights is wrong with their moments too, and is said once.
        held = {name: tensor.shape for name, tensor in reader.manifest.tensors.items()}
        weights = {name: shape for name, shape in held.items() if name.startswith(WEIGHT)}
        others = {name: shape for name, shape in held.items() if name not in weights}
        rows += self._shape_rows(weights, WEIGHT) or self._shape_rows(others, *(f"{kind}/" for kind in MOMENTS))
        theirs = reader.manifest.tokenizer_sha256
        if theirs is not None and self.tokenizer_sha256 not in (None, theirs):
            rows.append(("tokenizer (SHA-256)", str(self.tokenizer_sha256)[:12], theirs[:12]))
        if rows:
            raise UserError(
                f"{reader.folder}: is of another run:\n{difference_table(rows, *_HEADINGS)}"
                "resume from another checkpoint, take its weights alone with init_from, or begin anew with resume=never"
            )

    def require_weights(self, weights: Weights) -> None:
        """Raise UserError, with a table of the differences, where weights are not of this run's shapes."""
        if rows := shape_differences(self.shapes, weights.shapes):
            rows = [*self._model_rows(weights.model.model_dump(mode="json")), *rows]
            raise UserError(
                f"init_from={weights.origin}: holds the weights of another model:\n{difference_table(rows, *_HEADINGS)}"
                "write its sizes into the section model, or name other weights"
            )

    def differing_settings(self, weights: Weights) -> list[str]:
        """Return the settings of the model in which weights of the right shapes were not trained, a line each."""
        rows = self._model_rows(weights.model.model_dump(mode="json"))
        told = [f"{name}={wanted} here, {held} where the weights are from" for name, wanted, held in rows]
        theirs = weights.reader.manifest.tokenizer_sha256 if isinstance(weights, CheckpointWeights) else None
        if theirs is not None and self.tokenizer_sha256 not in (None, theirs):
            told.append("data.tokenizer is another than that of the weights: their rows stand for other tokens")
        return told

    def _shape_rows(self, held: Mapping[str, tuple[int, ...]], *prefixes: str) -> list[tuple[str, str, str]]:
        return shape_differences(
            {prefix + name: self.shapes[name] for prefix in prefixes for name in self.shapes}, held
        )

    def _model_rows(self, theirs: Mapping[str, object]) -> Iterator[tuple[str, str, str]]:
        ours = self.model.model_dump(mode="json")
        with suppress(ValueError):  # the settings of a version that knew more or less
            theirs = read_model(theirs).model_dump(mode="json")
        for key in sorted({*ours, *theirs} - set(_NOT_OF_THE_FUNCTION)):
            if key in ours and key in theirs and ours[key] == theirs[key]:
                continue
            yield f"model.{key}", _shown(ours, key), _shown(theirs, key)


def _shown(settings: Mapping[str, object], key: str) -> str:
    return str(settings[key]) if key in settings else "-"
