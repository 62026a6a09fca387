"""The weights of a Megatron checkpoint by their global names, each box read from the shards when it is asked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megalite.checkpoint.mismatch_table import mismatch_table
from megalite.checkpoint.model_files import model_files_among
from megalite.checkpoint.safetensors_file import ENCODINGS
from megalite.config import ModelConfig
from megalite.convert.megatron.model_args import MODEL_FILE, build_model, model_section, read_section
from megalite.convert.megatron.state_dict import Collection, checkpoint_folder, collect
from megalite.convert.megatron.tp_shards import Divided, Division
from megalite.errors import UserError
from megalite.model.structure import weight_shapes
from megalite.parallel.regions import Region

if TYPE_CHECKING:
    from torch import Tensor

_TABLE = "embedding.tokens.weight"
_PRECISIONS = {f"torch.{encoding.torch_name}": precision for precision, encoding in ENCODINGS.items()}


class MegatronWeights:
    """The weights of a checkpoint of Megatron-LM or Megatron-DeepSpeed, `path` being its folder or that above it.

    The model is what the options of the run that wrote it say. A section `model`, in `model_file` or as ``model.json``
    in the checkpoint's folder, stands in their place, or before them where it names no architecture: ``vocab_size``
    alone cuts a padded vocabulary. `notes` are what the user should hear of that.

    Raises UserError where there is no such checkpoint, where the model is none of megalite's, and where tensors are
    missing, unexpected, or of other sizes than the model's.
    """

    def __init__(self, path: Path, model_file: Path | None = None) -> None:
        folder = checkpoint_folder(path)
        if folder is None:
            raise UserError(f"{path}: no checkpoint of Megatron's, neither a folder iter_N nor global_stepN")
        self.origin = folder
        collection = collect(folder)
        if _TABLE not in collection.shards:
            raise UserError(f"{folder}: holds no token embedding; the checkpoint is not of a GPT model, or not whole")
        self.model, self.notes = _model(collection, path, model_file)
        self.precision = _precision(collection)
        self._tensors = _divide(collection, self.model)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    @property
    def model_files(self) -> Mapping[str, Path]:
        return model_files_among(self.origin, sorted(path.name for path in self.origin.iterdir() if path.is_file()))

    def read(self, name: str, region: Region, out: np.ndarray) -> None:
        if name not in self._tensors:
            raise UserError(f"{self.origin}: holds no tensor {name}")
        self._tensors[name].read(region, out)


def _model(collection: Collection, path: Path, model_file: Path | None) -> tuple[ModelConfig, tuple[str, ...]]:
    """Return the model, and what the user should hear of it."""
    folder = collection.folder
    beside = [at / MODEL_FILE for at in (folder, path) if (at / MODEL_FILE).is_file()]
    given = read_section(model_file or beside[0]) if model_file or beside else {}
    if collection.args is None and "architecture" not in given:
        raise UserError(
            f"{folder}: does not tell the options of the run that wrote it; write the section model of a run file, "
            f"architecture and all, as {folder / MODEL_FILE}"
        )
    told = {} if "architecture" in given else model_section(collection.args or {}, folder)
    section = told | given
    padded = sum(shard.shape[0] for shard in collection.shards[_TABLE])
    told_size = section.setdefault("vocab_size", padded)
    notes = collection.notes
    if told_size == padded:
        notes += (
            f"the vocabulary has {padded:,} rows, and its tokenizer may have fewer ids; to cut what is padding, write "
            f'{{"vocab_size": IDS}} as {folder / MODEL_FILE}',
        )
    elif isinstance(told_size, int) and told_size < padded:
        notes += (f"the vocabulary's {padded:,} rows are cut to the {told_size:,} of vocab_size",)
    return build_model(section, folder), notes


def _precision(collection: Collection) -> str:
    dtype = str(collection.shards[_TABLE][0].dtype)
    if dtype not in _PRECISIONS:
        raise UserError(f"{collection.folder}: its weights are {dtype}; {', '.join(_PRECISIONS)} are read")
    return _PRECISIONS[dtype]


def _divide(collection: Collection, model: ModelConfig) -> dict[str, Divided]:
    if collection.version < 2 and model.num_key_value_heads != model.num_attention_heads:
        raise UserError(
            f"{collection.folder}: checkpoint_version={collection.version} with grouped queries, which no Megatron "
            "wrote; correct num_key_value_heads"
        )
    zero_centred = bool((collection.args or {}).get("apply_layernorm_1p"))
    shapes = weight_shapes(model)
    division = Division(model, shapes, collection.version, zero_centred)
    tensors: dict[str, Divided] = {}
    rows: list[tuple[str, str, str]] = []
    used = _copies(model)
    for name, shape in shapes.items():
        source = division.source(name)
        used.add(source)
        shards = collection.shards.get(source)
        divided = division.divided(name, shards) if shards else None
        if divided is not None:
            tensors[name] = divided
        else:
            rows.append((name, _by_x(shape), _held(shards)))
    rows += [(name, "missing", _held(shards)) for name, shards in collection.shards.items() if name not in used]
    if rows:
        raise UserError(
            f"{collection.folder}: holds other tensors than its model has:\n"
            f"{mismatch_table(rows, 'the model has', 'the files hold')}"
            f"correct what is wrong of the model in {collection.folder / MODEL_FILE}"
        )
    return tensors


def _held(shards: "Sequence[Tensor] | None") -> str:
    if not shards:
        return "missing"
    each = " and ".join(dict.fromkeys(_by_x(tuple(shard.shape)) for shard in shards))
    return each if len(shards) == 1 else f"{len(shards)} shards of {each}"


def _by_x(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _copies(model: ModelConfig) -> set[str]:
    """What a last stage may hold once more: of a tied table."""
    return {"head.weight"} if model.tie_word_embeddings else set()
