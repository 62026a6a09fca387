"""Compatibility check of a checkpoint, or of other weights, with a run's model, tensor shapes and tokenizer."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from megalite.checkpoint.manifest import MOMENTS
from megalite.checkpoint.mismatch_table import mismatch_table, shape_mismatches
from megalite.checkpoint.reader import CheckpointReader
from megalite.checkpoint.weights import WEIGHT, CheckpointWeights
from megalite.config import ModelConfig, read_model
from megalite.errors import UserError
from megalite.model.weights import Weights

_TRAINING_ONLY = ("attention_dropout", "hidden_dropout", "initializer_range")
"""Settings of the model that do not change the function that its weights compute."""


@dataclass(frozen=True, slots=True)
class CheckpointRequirements:
    """The model, the global shapes of the weights and the tokenizer that a run requires of a checkpoint."""

    model: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    tokenizer_sha256: str | None

    def require_resumable(self, reader: CheckpointReader) -> None:
        """Raise UserError, with a table of the differences, if a run of these requirements cannot resume from it."""
        if not any(name.startswith(MOMENTS) for name in reader.manifest.tensors):
            raise UserError(
                f"{reader.folder}: holds weights without optimizer state, so no run can resume from it; start from its "
                f"weights with init_from={reader.folder}"
            )
        rows = list(self._model_rows(dict(reader.manifest.model)))
        # The moments have the shapes of the weights: report their mismatches only if the weights have none.
        shapes = {name: tensor.shape for name, tensor in reader.manifest.tensors.items()}
        weights = {name: shape for name, shape in shapes.items() if name.startswith(WEIGHT)}
        others = {name: shape for name, shape in shapes.items() if name not in weights}
        rows += self._shape_rows(weights, WEIGHT) or self._shape_rows(others, *(f"{kind}/" for kind in MOMENTS))
        theirs = reader.manifest.tokenizer_sha256
        if theirs is not None and self.tokenizer_sha256 not in (None, theirs):
            rows.append(("tokenizer (SHA-256)", str(self.tokenizer_sha256)[:12], theirs[:12]))
        if rows:
            raise UserError(
                f"{reader.folder}: does not fit this run:\n{mismatch_table(rows, 'run file', 'checkpoint')}"
                "resume from another checkpoint, use its weights alone with init_from, or start anew with resume=never"
            )

    def require_weights(self, weights: Weights) -> None:
        """Raise UserError, with a table of the differences, if weights do not have this run's shapes."""
        if rows := shape_mismatches(self.shapes, weights.shapes):
            rows = [*self._model_rows(weights.model.model_dump(mode="json")), *rows]
            table = mismatch_table(rows, "run file", "weights")
            raise UserError(
                f"init_from={weights.origin}: holds the weights of another model:\n{table}"
                "write its sizes into the section model, or give other weights"
            )

    def differing_settings(self, weights: Weights) -> list[str]:
        """Return a line for each setting of the model, or tokenizer, that differs from the origin of the weights."""
        rows = self._model_rows(weights.model.model_dump(mode="json"))
        lines = [f"{name}={wanted} in this run, {held} in the origin of the weights" for name, wanted, held in rows]
        theirs = weights.reader.manifest.tokenizer_sha256 if isinstance(weights, CheckpointWeights) else None
        if theirs is not None and self.tokenizer_sha256 not in (None, theirs):
            lines.append("data.tokenizer differs from the tokenizer of the weights: their rows stand for other tokens")
        return lines

    def _shape_rows(self, found: Mapping[str, tuple[int, ...]], *prefixes: str) -> list[tuple[str, str, str]]:
        required = {prefix + name: self.shapes[name] for prefix in prefixes for name in self.shapes}
        return shape_mismatches(required, found)

    def _model_rows(self, theirs: Mapping[str, object]) -> Iterator[tuple[str, str, str]]:
        ours = self.model.model_dump(mode="json")
        with suppress(ValueError):  # another version wrote settings that this version does not know
            theirs = read_model(theirs).model_dump(mode="json")
        for key in sorted({*ours, *theirs} - set(_TRAINING_ONLY)):
            if key in ours and key in theirs and ours[key] == theirs[key]:
                continue
            yield f"model.{key}", _shown(ours, key), _shown(theirs, key)


def _shown(settings: Mapping[str, object], key: str) -> str:
    return str(settings[key]) if key in settings else "-"
