"""Compatibility check of a checkpoint, or of other weights, with a run's model, tensor shapes and tokenizer."""

from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from megalite.checkpoint.mismatch_table import mismatch_table, shape_mismatches
from megalite.checkpoint.reader import CheckpointReader
from megalite.checkpoint.weights import WEIGHT, CheckpointWeights
from megalite.config import ModelConfig, read_model
from megalite.errors import UserError
from megalite.model.weights import Weights
from megalite.optim.declaration import OptimizerDeclaration

_TRAINING_ONLY = ("attention_dropout", "hidden_dropout", "initializer_range")
"""Settings of the model that do not change the function that its weights compute."""


@dataclass(frozen=True, slots=True)
class CheckpointRequirements:
    """What a run requires of a checkpoint: model, global shapes of the weights, optimizer state, and tokenizer."""

    model: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    tokenizer_sha256: str | None
    optimizer: OptimizerDeclaration
    frozen: Set[str] = frozenset()
    """The names of frozen parameters, which have no optimizer state."""

    def require_resumable(self, reader: CheckpointReader) -> None:
        """Raise UserError, with a table of the differences, if a run of these requirements cannot resume from it."""
        self._require_optimizer(reader)
        rows = list(self._model_rows(dict(reader.manifest.model)))
        # The state has the shapes of the weights: report its mismatches only if the weights have none.
        shapes = {name: tensor.shape for name, tensor in reader.manifest.tensors.items()}
        weights = {name: shape for name, shape in shapes.items() if name.startswith(WEIGHT)}
        others = {name: shape for name, shape in shapes.items() if name not in weights}
        trained = {name: shape for name, shape in self.shapes.items() if name not in self.frozen}
        required = product(self.optimizer.state_tensors, trained.items())
        wrong = shape_mismatches({f"{WEIGHT}{name}": shape for name, shape in self.shapes.items()}, weights)
        if not wrong:
            self._require_same_frozen(reader.folder, set(others))
            wrong = shape_mismatches({f"{state}/{name}": shape for state, (name, shape) in required}, others)
        rows += wrong
        theirs = reader.manifest.tokenizer_sha256
        if theirs is not None and self.tokenizer_sha256 not in (None, theirs):
            rows.append(("tokenizer (SHA-256)", str(self.tokenizer_sha256)[:12], theirs[:12]))
        if rows:
            raise UserError(
                f"{reader.folder}: does not fit this run:\n{mismatch_table(rows, 'run file', 'checkpoint')}"
                "resume from another checkpoint, use its weights alone with init_from, or start anew with resume=never"
            )

    def _require_optimizer(self, reader: CheckpointReader) -> None:
        """Raise UserError if the checkpoint holds no optimizer state, or the state of another optimizer."""
        theirs, start = reader.manifest.trained_by, f"start from its weights with init_from={reader.folder}"
        if theirs is None:
            raise UserError(
                f"{reader.folder}: holds weights without optimizer state, so no run can resume from it; {start}"
            )
        if theirs != self.optimizer.name:
            raise UserError(
                f"{reader.folder}: holds the optimizer state of {theirs!r}, and train.optimizer.name="
                f"{self.optimizer.name!r}; write the same optimizer, or {start} and resume=never"
            )

    def _require_same_frozen(self, folder: Path, state: Set[str]) -> None:
        """Raise UserError if another set of parameters was frozen when the checkpoint's optimizer state was saved."""
        kinds = self.optimizer.state_tensors
        stateless = {name for name in self.shapes if not any(f"{kind}/{name}" in state for kind in kinds)}
        differing = [name for name in self.shapes if (name in stateless) != (name in self.frozen)]
        if differing and kinds:
            is_frozen = differing[0] in self.frozen
            here, there = ("frozen", "trained") if is_frozen else ("trained", "frozen")
            more = f", and {len(differing) - 1:,} more differ" if len(differing) > 1 else ""
            raise UserError(
                f"{folder}: {differing[0]} is {here} in this run and was {there} in the checkpoint's{more}; freeze the "
                f"same parameters in train.optimizer.groups, or start from its weights with init_from={folder} and "
                "resume=never"
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
