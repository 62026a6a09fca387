"""The weights of a Hugging Face folder, box by box, under our names."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megalite.checkpoint.mismatch_table import mismatch_table, shape_mismatches
from megalite.checkpoint.model_files import model_files_among
from megalite.checkpoint.safetensors_file import ENCODINGS
from megalite.convert.huggingface.config import CONFIG, model_of, notes_on
from megalite.convert.huggingface.folder import TensorFiles, inside, read_json
from megalite.convert.huggingface.tensor_map import Tensor, tensors_of
from megalite.errors import UserError
from megalite.parallel.regions import Region

_COMPARED_ELEMENTS = 1 << 22


def is_hugging_face(folder: Path) -> bool:
    """Tell whether a folder is a model of Hugging Face's: whether it has a ``config.json`` that names its type."""
    try:
        return isinstance(read_json(folder / CONFIG).get("model_type"), str)
    except UserError:
        return False


class HuggingFaceWeights:
    """A folder with ``config.json`` and weights, one file or several with an index; satisfies `Weights`.

    Raises UserError for a model that this package does not compute, for files that hold more than tensors or lie
    elsewhere, and, with a table of the differences, for tensors that are not those of the model. `max_positions`
    shortens the longest sequence that the model takes. `notes` say what of the folder was not read or is not kept.
    """

    def __init__(self, folder: Path, *, max_positions: int | None = None) -> None:
        self.origin = folder
        path = inside(folder, CONFIG)
        self.config = read_json(path)
        """What ``config.json`` holds."""
        self.format, self.model = model_of(self.config, path, max_positions)
        self._files = TensorFiles(folder)
        self.notes = (*self._files.unread, *notes_on(self.format, self.model, self.config))
        tensors = {tensor.name: tensor for tensor in tensors_of(self.format, self.model)}
        self.precision = self._precision()
        self._stored_name = self._match(tensors)
        self._places = {ours: (one, part) for one in tensors.values() for part, ours in enumerate(one.ours)}
        self.shapes: Mapping[str, tuple[int, ...]] = {ours: one.part_shape for ours, (one, _) in self._places.items()}

    @property
    def files(self) -> list[str]:
        """The names of the files that hold the weights."""
        return self._files.files

    @property
    def stored(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        """The shape and the type of each tensor, by the names that they have in the files."""
        return {name: (shape, self._files.dtypes[name]) for name, shape in self._files.shapes.items()}

    @property
    def model_files(self) -> Mapping[str, Path]:
        """The files beside the weights that go with them."""
        found = model_files_among(self.origin, sorted(path.name for path in self.origin.iterdir()))
        return {name: inside(self.origin, name) for name in found}

    def read(self, name: str, region: Region, out: np.ndarray) -> None:
        """Fill `out`, fp32 of the box's shape, with a box of a weight; raise UserError where that cannot be read."""
        if name not in self._places:
            raise UserError(f"{self.origin}: holds no weight {name}")
        tensor, part = self._places[name]
        for stored, within in tensor.pieces(part, region):
            piece = self._files.read(self._stored_name[tensor.name], stored)
            out[within.slices] = piece.T if tensor.transposed else piece

    def _match(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Return the stored name of each of the model's tensors; raise UserError where these are not all there is."""
        stored = {self._canonical(name): name for name in self._files.shapes if not self._is_buffer(name)}
        head, table = f"{self.format.head}.weight", next(iter(tensors))
        if self.model.tie_word_embeddings and head in stored:
            self._require_equal(stored.pop(head), stored.get(table, table))
        wanted = {name: tensor.shape for name, tensor in tensors.items()}
        rows = shape_mismatches(wanted, {name: self._files.shapes[one] for name, one in stored.items()})
        if len(rows) == 1 and head in wanted and head not in stored:
            raise UserError(
                f"{self.origin}: holds no {head}, and its {CONFIG} says tie_word_embeddings=false; if the head is "
                f"{table}, write tie_word_embeddings: true there, else take a folder with all files of the model"
            )
        if rows:
            raise UserError(
                f"{self.origin}: its tensors are not those of the {self.format.model_type} in its {CONFIG}:\n"
                f"{mismatch_table(rows, f'{CONFIG} asks', 'it holds')}"
                f"take a model of class {self.format.causal_class}, with all its files"
            )
        return stored

    def _canonical(self, name: str) -> str:
        """Return the name of a tensor that a model was saved with under another, without its head say."""
        form = self.format
        if name in (f"{head}.weight" for head in (form.head, *form.other_heads)):
            return f"{form.head}.weight"
        prefixed = any(one.startswith(form.prefix) for one in self._files.shapes)
        return name if prefixed else form.prefix + name

    def _is_buffer(self, name: str) -> bool:
        return name.endswith(self.format.buffers)

    def _precision(self) -> str:
        """Return the one precision that the tensors are stored in, fp32 where they are in several."""
        known = {encoding.dtype: precision for precision, encoding in ENCODINGS.items()}
        dtypes = {dtype for name, dtype in self._files.dtypes.items() if not self._is_buffer(name)}
        if strange := sorted(dtypes - set(known)):
            raise UserError(f"{self.origin}: tensors are stored as {strange[0]}; allowed: {', '.join(known)}")
        return known[dtypes.pop()] if len(dtypes) == 1 else "fp32"

    def _require_equal(self, head: str, table: str) -> None:
        """Refuse a head that is stored beside the table that it is tied to, unless it is the same."""
        shapes = self._files.shapes
        same = shapes[head] == shapes.get(table)
        rows, width = shapes[head] if same else (0, 1)
        step = max(1, _COMPARED_ELEMENTS // width)
        for start in range(0, rows, step):
            region = Region((start, 0), (min(step, rows - start), width))
            same = same and np.array_equal(
                self._files.read(head, region), self._files.read(table, region), equal_nan=True
            )
        if not same:
            raise UserError(
                f"{self.origin / CONFIG}: tie_word_embeddings=true, but {head} is another tensor than {table}; "
                "write tie_word_embeddings: false"
            )
