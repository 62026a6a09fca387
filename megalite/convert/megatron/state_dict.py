"""What the files of a Megatron checkpoint hold, under one set of names, each tensor as the shards of the tensor ranks.

Three layouts are public: Megatron-LM's, a folder a rank; Megatron-DeepSpeed's without a pipeline, a file a tensor rank;
and its pipeline module's, a file a layer and tensor rank. Layers are numbered within their stage in the first, and
within the pipeline module's list in the last; here they count through the model.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalite.convert.megatron.torch_file import read_torch_file
from megalite.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

RANK_FILES = ("model_optim_rng.pt", "model_rng.pt")
"""The second name is that of releases in which the optimizer's state lay in a file of its own."""

_RANK_FOLDER = re.compile(r"mp_rank_(\d{2,5})(?:_(\d{3,5}))?")
_MODEL_STATES = re.compile(r"mp_rank_(\d{2,5})_model_states\.pt")
_LAYER_FILE = re.compile(r"layer_(\d{2,5})(?:-model_(\d{2,5}))?-model_states\.pt")
_ZERO_3_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_DISTRIBUTED = ("common.pt", "metadata.json")

_WRAPPERS = re.compile(r"^(?:(?:module|language_model|encoder|transformer|decoder)\.)+")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_NO_WEIGHT = re.compile(r"(.*\.)?(_extra_state\w*|inv_freq|word_embeddings_for_head\.weight)")
"""Transformer Engine's own state, a buffer that follows from the options, the last stage's copy of a tied table."""

_NAMES = {
    "embedding.word_embeddings": "embedding.tokens",
    "word_embeddings": "embedding.tokens",
    "embedding.position_embeddings": "embedding.positions",
    "position_embeddings": "embedding.positions",
    "final_layernorm": "final_norm",
    "final_norm": "final_norm",
    "output_layer": "head",
    "lm_head": "head",
}
_LAYER_NAMES = {
    "input_layernorm": "attention_norm",
    "input_norm": "attention_norm",
    "self_attention.linear_qkv.layer_norm": "attention_norm",
    "attention.query_key_value": "attention.query_key_value",
    "self_attention.query_key_value": "attention.query_key_value",
    "self_attention.linear_qkv": "attention.query_key_value",
    "self_attention.q_layernorm": "attention.query_norm",
    "self_attention.k_layernorm": "attention.key_norm",
    "attention.dense": "attention.output",
    "self_attention.dense": "attention.output",
    "self_attention.linear_proj": "attention.output",
    "post_attention_layernorm": "mlp_norm",
    "post_attention_norm": "mlp_norm",
    "pre_mlp_layernorm": "mlp_norm",
    "mlp.linear_fc1.layer_norm": "mlp_norm",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.linear_fc1": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
    "mlp.linear_fc2": "mlp.down",
}
"""The modules of Megatron's first model, of Megatron-core's, and of that with norms fused into Transformer Engine's
linear layers, by the names that they have here: megalite's, but with q, k, v and gate, up in one tensor each."""


@dataclass(slots=True)
class Collection:
    """The shards of each tensor, by tensor rank; the options that the files tell, and their version of packing.

    `notes` say what was supposed of the files, since they do not tell it.
    """

    folder: Path
    args: Mapping[str, object] | None = None
    version: float = 3.0
    notes: tuple[str, ...] = ()
    shards: dict[str, list["Tensor"]] = field(default_factory=dict)

    def add(self, name: str, ranks: Sequence[Mapping[str, "Tensor"]], key: str) -> None:
        """Take one tensor, which has the name `key` in the files of all tensor ranks."""
        if name in self.shards:
            raise UserError(f"{self.folder}: holds {name} twice; use another checkpoint")
        if any(key not in rank for rank in ranks):
            raise UserError(f"{self.folder}: {key} is not in the files of all tensor ranks; use another checkpoint")
        self.shards[name] = [rank[key] for rank in ranks]


def checkpoint_folder(path: Path) -> Path | None:
    """Return the folder with the files of a checkpoint: `path`, or the newest below it; None where there is none."""
    if _holds_files(path):
        return path
    for tracker, prefix in (("latest_checkpointed_iteration.txt", "iter_"), ("latest", "")):
        if (path / tracker).is_file():
            word = (path / tracker).read_text(encoding="utf-8", errors="replace").strip()
            name = f"{prefix}{int(word):07d}" if prefix and word.isdecimal() else word
            if re.fullmatch(r"\w[\w.-]*", name) and _holds_files(path / name):
                return path / name
    return None


def collect(folder: Path) -> Collection:
    """Read the files of a checkpoint.

    Raises UserError where files are missing, are of a layout that is not read, or hold no tensors.
    """
    names = sorted(path.name for path in folder.iterdir())
    if layers := _numbered(folder, names, _LAYER_FILE):
        return _collect_layers(folder, layers, _numbered(folder, names, _MODEL_STATES))
    if files := _numbered(folder, names, _MODEL_STATES):
        return _collect_ranks(folder, {(tensor, 0): path for (tensor,), path in files.items()})
    files = {
        (tensor, stage): file
        for (tensor, stage), path in _numbered(folder, names, _RANK_FOLDER).items()
        for file in [path / name for name in RANK_FILES if (path / name).is_file()][:1]
    }
    if not files and _numbered(folder, names, _ZERO_3_FILE):
        raise UserError(
            f"{folder}: has its weights divided by ZeRO-3, which is not read; put them together with the "
            'zero_to_fp32.py above it, and save the result as {"model": ...} in mp_rank_00/model_optim_rng.pt'
        )
    if not files:
        raise UserError(
            f"{folder}: is in Megatron's distributed format, which is not read; write it anew with Megatron's own "
            "--ckpt-convert-format torch"
        )
    return _collect_ranks(folder, files)


def _holds_files(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    if all(name in names for name in _DISTRIBUTED):
        return True
    if any(pattern.fullmatch(name) for pattern in (_MODEL_STATES, _LAYER_FILE, _ZERO_3_FILE) for name in names):
        return True
    ranks = (folder / name for name in names if _RANK_FOLDER.fullmatch(name))
    return any((rank / file).is_file() for rank in ranks for file in RANK_FILES)


def _numbered(folder: Path, names: Iterable[str], pattern: re.Pattern[str]) -> dict[tuple[int, ...], Path]:
    found = ((pattern.fullmatch(name), name) for name in names)
    return {tuple(int(n or 0) for n in match.groups()): folder / name for match, name in found if match}


def _collect_ranks(folder: Path, files: Mapping[tuple[int, ...], Path]) -> Collection:
    """Megatron-LM's files, and Megatron-DeepSpeed's without a pipeline: a file for each (tensor rank, stage)."""
    tensor_size, num_stages = (max(place[axis] for place in files) + 1 for axis in (0, 1))
    missing = [(t, p) for t in range(tensor_size) for p in range(num_stages) if (t, p) not in files]
    if missing:
        ranks = ", ".join(f"(tensor {t}, pipeline {p})" for t, p in missing[:4])
        raise UserError(f"{folder}: lacks the files of {len(missing)} ranks: {ranks}; copy the checkpoint whole")
    contents = {place: read_torch_file(path) for place, path in files.items()}
    collection = _begin(folder, contents[0, 0])
    first_layer = 0
    # With virtual stages a file holds model0, model1, ...: the first parts of all stages stand before the second ones.
    for key in _model_keys(files[0, 0], contents[0, 0]):
        for stage in range(num_stages):
            ranks = [_tensors(files[t, stage], contents[t, stage], key) for t in range(tensor_size)]
            first_layer += _add_stage(collection, ranks, first_layer)
    return collection


def _add_stage(collection: Collection, ranks: Sequence[Mapping[str, "Tensor"]], first_layer: int) -> int:
    """Take what one stage holds, and return how many layers that are."""
    layers = 0
    for key in ranks[0]:
        layer, name = _renamed(key)
        if layer is not None:
            layers = max(layers, layer + 1)
            name = f"layers.{first_layer + layer}.{name}"
        collection.add(name, ranks, key)
    return layers


def _collect_layers(
    folder: Path, files: Mapping[tuple[int, ...], Path], model_states: Mapping[tuple[int, ...], Path]
) -> Collection:
    """The pipeline module's files: what a layer is tells from its tensors."""
    states = read_torch_file(model_states[min(model_states)]) if model_states else {}
    # Pipeline modules are younger than the last change of packing.
    collection = _begin(folder, {"checkpoint_version": 3.0} | states)
    tensor_size, block = max(tensor for _, tensor in files) + 1, 0
    for number in sorted({layer for layer, _ in files}):
        paths = [files.get((number, tensor)) for tensor in range(tensor_size)]
        ranks = [dict(_flat(read_torch_file(path))) for path in paths if path is not None]
        if len(ranks) < tensor_size:
            raise UserError(
                f"{folder}: lacks files of layer_{number:02d}, one a tensor rank; copy the checkpoint whole"
            )
        names = [name for name in ranks[0] if not _NO_WEIGHT.fullmatch(name)]
        is_block = any(_module_and_leaf(name)[0] in _LAYER_NAMES for name in names)
        for name in names:
            collection.add(_layer_file_name(name, block if is_block else None), ranks, name)
        block += is_block
    return collection


def _layer_file_name(name: str, block: int | None) -> str:
    if name in ("weight", "bias"):
        return f"final_norm.{name}"
    return _renamed(name)[1] if block is None else f"layers.{block}.{_renamed(f'layers.0.{name}')[1]}"


def _begin(folder: Path, content: Mapping[str, Any]) -> Collection:
    args, version = content.get("args"), content.get("checkpoint_version")
    told = args if isinstance(args, Mapping) or args is None else getattr(args, "__dict__", None)
    if version is None:
        # Megatron takes the first version then. Megatron-core's names are younger than the last one.
        if any("linear_qkv" in name for name, _ in _flat(content)):
            return Collection(folder, told)
        note = "its files tell no checkpoint_version: queries, keys and values are read in the packing of version 0"
        return Collection(folder, told, 0.0, (note,))
    if not isinstance(version, int | float):
        raise UserError(f"{folder}: its checkpoint_version is {version!r}, no number; use another checkpoint")
    return Collection(folder, told, float(version))


def _model_keys(path: Path, content: Mapping[str, Any]) -> list[str]:
    parts = [key for key in content if isinstance(key, str) and re.fullmatch(r"model\d+", key)]
    keys = sorted(parts, key=lambda key: int(key.removeprefix("model"))) or [
        key for key in ("model", "module") if isinstance(content.get(key), Mapping)
    ]
    if not keys:
        raise UserError(f"{path}: holds no model, only {', '.join(map(str, content))}; use another checkpoint")
    return keys[: None if parts else 1]


def _tensors(path: Path, content: Mapping[str, Any], key: str) -> dict[str, "Tensor"]:
    if not isinstance(content.get(key), Mapping):
        raise UserError(f"{path}: lacks {key}, which the first rank's file has; use another checkpoint")
    return {name: tensor for name, tensor in _flat(content[key]) if not _NO_WEIGHT.fullmatch(name)}


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, "Tensor"]]:
    """Yield the tensors of nested dicts: some releases nest a dict for each module, some have flat names."""
    from torch import Tensor

    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{key}", value


def _renamed(name: str) -> tuple[int | None, str]:
    """Return the layer within its stage and the name within that; what is not known keeps its name."""
    bare = _WRAPPERS.sub("", name)
    match = _LAYER.fullmatch(bare)
    if match is None:
        module, leaf = _module_and_leaf(bare)
        return None, f"{_NAMES[module]}.{leaf}" if module in _NAMES else name
    module, leaf = _module_and_leaf(match[2])
    return int(match[1]), f"{_LAYER_NAMES.get(module, module)}.{leaf}"


def _module_and_leaf(name: str) -> tuple[str, str]:
    module, _, leaf = name.rpartition(".")
    if leaf.startswith("layer_norm_"):  # Transformer Engine's fused layers
        return f"{module}.layer_norm", leaf.removeprefix("layer_norm_")
    return module, leaf
