"""A Hugging Face folder gives the weights of the model it holds, and takes them back to the bit."""

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hugging_face_models import LLAMA3_ROPE, SIZES, VARIANTS, save_model
from reference_model import stage_shapes
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalite.checkpoint.weights import CheckpointWeights
from megalite.config import read_model
from megalite.convert.conversion import RoundedWeights, to_checkpoint, to_hugging_face
from megalite.convert.huggingface.config import DEFAULT_WINDOW, config_of, model_of
from megalite.convert.huggingface.reader import HuggingFaceWeights
from megalite.convert.logits_check import largest_difference
from megalite.convert.open import open_weights
from megalite.errors import UserError
from megalite.model.families.llama.config import LlamaConfig
from megalite.model.formats.hugging_face import REQUIRED, HuggingFaceFormat
from megalite.model.registry import FAMILIES
from megalite.model.structure import weight_shapes
from megalite.model.weights import Weights
from megalite.parallel.regions import Region

pytestmark = pytest.mark.slow

PARITY = 1e-5
SMALL_SHARDS = 12_000


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function to the folder of a variant, in bf16 as models mostly come; not to be written to."""
    root, made = tmp_path_factory.mktemp("hugging_face"), {}

    def folder(variant: str) -> Path:
        if variant not in made:
            made[variant] = save_model(root / str(len(made)), variant, dtype=torch.bfloat16)
        return made[variant]

    return folder


def silent(done: int, total: int) -> None:
    assert 0 < done <= total


def export(weights: Weights, folder: Path, precision: str | None = None, max_shard_bytes: int = 1 << 30) -> Path:
    to_hugging_face(
        weights,
        weights.model_files,
        folder,
        silent,
        precision=precision or weights.precision,
        max_shard_bytes=max_shard_bytes,
    )
    return folder


def import_(weights: Weights, folder: Path) -> Weights:
    to_checkpoint(weights, weights.model_files, folder, silent)
    return open_weights(folder)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bits(folder: Path, other: Path) -> None:
    ours, theirs = tensors(folder), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


def whole(weights: Weights, name: str) -> np.ndarray:
    shape = weights.shapes[name]
    array = np.full(shape, np.nan, np.float32)
    weights.read(name, Region.whole(shape), array)
    return array


def rewrite(
    folder: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict, **keys: Any
) -> Path:
    """Copy a model with its tensors changed and keys of its config set, or taken away where they are `...`."""
    target.mkdir()
    config = json.loads((folder / "config.json").read_text()) | keys
    (target / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    save_file(change(tensors(folder)), target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_logits_are_those_of_transformers(saved: Callable[[str], Path], variant: str) -> None:
    weights = open_weights(saved(variant))
    assert isinstance(weights, HuggingFaceWeights)
    assert weights.precision == "bf16"
    difference, tokens = largest_difference(weights, saved(variant))
    assert tokens == 128
    assert difference <= PARITY


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_is_equal_to_the_bit_and_runs(
    saved: Callable[[str], Path], variant: str, tmp_path: Path
) -> None:
    held = import_(open_weights(saved(variant)), tmp_path / "step_0")
    assert isinstance(held, CheckpointWeights)
    assert held.precision == "bf16"
    back = export(held, tmp_path / "back")
    assert_same_bits(saved(variant), back)
    assert largest_difference(held, back)[0] <= PARITY
    assert open_weights(back).model == held.model


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_shapes_are_those_of_the_stage(saved: Callable[[str], Path], variant: str) -> None:
    weights = open_weights(saved(variant))
    assert dict(weights.shapes) == weight_shapes(weights.model) == stage_shapes(weights.model)


@pytest.mark.parametrize("variant", ["llama", "gpt2", "gpt_neox"])
def test_any_box_of_a_weight_is_that_of_the_whole(saved: Callable[[str], Path], variant: str) -> None:
    weights, draw = open_weights(saved(variant)), np.random.default_rng(0)
    for name, shape in weights.shapes.items():
        array = whole(weights, name)
        assert np.isfinite(array).all()
        for _ in range(8):
            start = tuple(int(draw.integers(0, size)) for size in shape)
            region = Region(
                start, tuple(int(draw.integers(1, size - at + 1)) for size, at in zip(shape, start, strict=True))
            )
            out = np.full(region.shape, np.nan, np.float32)
            weights.read(name, region, out)
            np.testing.assert_array_equal(out, array[region.slices])


def test_query_key_and_value_are_told_apart_in_what_is_fused(saved: Callable[[str], Path]) -> None:
    gpt2, neox = saved("gpt2"), saved("gpt_neox")
    fused = tensors(gpt2)["transformer.h.1.attn.c_attn.weight"].float().numpy()
    np.testing.assert_array_equal(whole(open_weights(gpt2), "layers.1.attention.key.weight"), fused[:, 32:64].T)
    by_head = tensors(neox)["gpt_neox.layers.1.attention.query_key_value.bias"].float().numpy().reshape(4, 3, 8)
    np.testing.assert_array_equal(whole(open_weights(neox), "layers.1.attention.value.bias"), by_head[:, 2].ravel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_files_in_pieces_and_every_precision(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", variant, dtype=dtype, max_shard_size="12KB")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    weights = open_weights(source)
    assert weights.precision == {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    back = export(import_(weights, tmp_path / "step_0"), tmp_path / "back", max_shard_bytes=SMALL_SHARDS)
    assert_same_bits(source, back)
    written = json.loads((back / "model.safetensors.index.json").read_text())
    assert written["metadata"] == index["metadata"]
    assert written["weight_map"].keys() == index["weight_map"].keys()
    files = sorted(back.glob("*.safetensors"))
    assert sorted({*written["weight_map"].values()}) == [file.name for file in files]
    for file in files:
        held = load_file(file)
        assert sum(tensor.nbytes for tensor in held.values()) <= SMALL_SHARDS or len(held) == 1
    assert largest_difference(weights, back)[0] <= PARITY


def test_another_precision_rounds_as_torch_does(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama")
    weights = open_weights(source)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        back = export(weights, tmp_path / precision, precision)
        ours, theirs = tensors(back), tensors(source)
        assert all(torch.equal(tensor, theirs[name].to(dtype)) for name, tensor in ours.items())
        assert json.loads((back / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        rounded = RoundedWeights(weights, precision)
        assert largest_difference(rounded, back)[0] <= PARITY
        assert largest_difference(weights, back)[0] > 10 * PARITY


def test_what_fp16_cannot_hold_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    large = rewrite(
        saved("llama"), tmp_path / "large", lambda held: held | {"model.norm.weight": torch.full((32,), 7e4)}
    )
    assert open_weights(large).precision == "fp32"  # one tensor is, the others are bf16
    with pytest.raises(UserError, match=r"--dtype=fp16: model\.norm\.weight has elements beyond 65,504"):
        export(open_weights(large), tmp_path / "out", "fp16")


def test_memory_is_bounded_by_the_largest_tensor_not_by_the_model(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 6, "hidden_size": 512, "num_attention_heads": 4, "intermediate_size": 512}
    model = read_model({**sizes, "architecture": "gpt_neox", "vocab_size": 96, "max_position_embeddings": 32})
    weights = _Drawn(model)
    largest = 4 * 3 * 512 * 512  # the fused one
    assert sum(map(prod, weights.shapes.values())) * 4 > 8 * largest
    for convert in (export, import_):
        convert(weights, tmp_path / convert.__name__)  # what is imported on the way is not meant
        tracemalloc.start()
        convert(weights, tmp_path / f"{convert.__name__} again")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2.5 * largest  # one that is written, and the next


class _Drawn:
    """Weights that are made when they are read."""

    def __init__(self, model: Any) -> None:
        self.model, self.shapes = model, weight_shapes(model)
        self.origin, self.precision, self.model_files = Path("drawn"), "fp32", {}

    def read(self, name: str, region: Region, out: np.ndarray) -> None:
        out[...] = 0.5


def test_names_without_prefix_and_buffers_that_follow_from_the_settings(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    def bare(held: dict[str, Tensor]) -> dict[str, Tensor]:
        buffers = {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.tensor(-1e4)}
        return {name.removeprefix("transformer."): tensor for name, tensor in held.items()} | buffers

    folder = rewrite(saved("gpt2"), tmp_path / "bare", bare)
    weights = open_weights(folder)
    assert weights.precision == "bf16"
    back = export(weights, tmp_path / "back")
    assert_same_bits(saved("gpt2"), back)


def test_the_head_of_neox_under_its_newer_name(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = rewrite(
        saved("gpt_neox"),
        tmp_path / "new",
        lambda held: {name.replace("embed_out", "lm_head"): held[name] for name in held},
    )
    assert_same_bits(saved("gpt_neox"), export(open_weights(folder), tmp_path / "back"))


def test_a_tied_head_that_is_stored_as_well_is_the_table_or_refused(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    source = saved("llama, grouped and tied")
    table = tensors(source)["model.embed_tokens.weight"]
    same = rewrite(source, tmp_path / "same", lambda held: held | {"lm_head.weight": table.clone()})
    assert_same_bits(source, export(open_weights(same), tmp_path / "back"))
    other = rewrite(source, tmp_path / "other", lambda held: held | {"lm_head.weight": table + 1})
    with pytest.raises(UserError, match="tie_word_embeddings=true, but lm_head.weight is another tensor"):
        open_weights(other)


OLDER = [
    (
        "llama",
        {"rope_parameters": ..., "rope_theta": 5e5, "dtype": ..., "torch_dtype": "bfloat16"},
        {"rope_theta": 5e5},
    ),
    (
        "llama",
        {"rope_parameters": ..., "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    (
        "llama",
        {
            "rope_parameters": ...,
            "rope_theta": 5e5,
            "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"},
        },
        {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}},
    ),
    (
        "gpt_neox",
        {"rope_parameters": ..., "rotary_pct": 0.5, "rotary_emb_base": 5000},
        {"rotary_pct": 0.5, "rope_theta": 5000.0},
    ),
]


@pytest.mark.parametrize(("variant", "keys", "ours"), OLDER)
def test_configs_of_older_versions(
    saved: Callable[[str], Path], variant: str, keys: dict[str, Any], ours: dict[str, Any], tmp_path: Path
) -> None:
    folder = rewrite(saved(variant), tmp_path / "older", **keys)
    weights = open_weights(folder)
    model = weights.model.model_dump(exclude_none=True)
    assert {key: model[key] for key in ours} == ours
    assert largest_difference(weights, folder)[0] <= PARITY


def test_a_config_that_is_written_says_the_same_by_the_older_keys() -> None:
    for scaling in (
        None,
        {"rope_type": "linear", "factor": 2.0},
        {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"},
    ):
        model = read_model({**OURS, "rope_scaling": scaling, "rope_theta": 2e4})
        _, written = config_of(model, "fp32", {})
        assert model_of(written, Path("x"))[1] == model
        del written["rope_parameters"]
        assert model_of(written, Path("x"))[1] == model


OURS: dict[str, Any] = {
    "architecture": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_bias": True, "qk_norm": True}, "attention_bias=true and qk_norm=true"),
        ({"attention_output_bias": True}, "attention_output_bias=true and none of the other biases"),
        ({"attention_bias": True, "mlp_bias": True}, "attention_bias=true and mlp_bias=true"),
        ({"hidden_size": 36, "num_attention_heads": 8, "head_dim": 4}, "num_attention_heads=8 divides hidden_size=36"),
        ({"architecture": "gpt2", "head_dim": 4}, "head_dim=4: transformers' GPT2LMHeadModel"),
    ],
)
def test_a_model_that_no_class_of_theirs_computes_is_not_written(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(read_model(OURS | settings), "fp32", {})


REFUSED = [
    ("llama", {"model_type": "lama"}, "model_type='lama' is none .* did you mean 'llama'"),
    ("llama", {"model_type": "mixtral"}, "model_type='mixtral' is none of the families"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not what megalite computes"),
    ("llama", {"attention_bias": 1}, "attention_bias"),
    ("llama", {"mlp_bias": "yes"}, "mlp_bias"),
    ("mistral", {"mlp_bias": True}, "mlp_bias=true is not known of a mistral"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope_type='yarn'"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.rope_type='dynamic'"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}}, "rope_scaling.beta_fast"),
    ("llama", {"rope_scaling": [4.0]}, "rope_scaling=.* is no mapping"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config={...} is not known of a llama"),
    ("llama", {"vocab_size": ...}, "vocab_size is missing"),
    ("llama", {"hidden_size": "wide"}, "describes no model that megalite knows: hidden_size='wide' is not an integer"),
    ("llama", {"rope_theta": "1000000", "rope_parameters": ...}, "knows: rope_theta='1000000' is not a number above 0"),
    ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling_x.Model"}}, "auto_map names code .* never run"),
    ("mistral", {"sliding_window": 16}, "sliding_window=16 is below max_position_embeddings=64.*--max-positions 16"),
    ("mistral", {"sliding_window": ..., "max_position_embeddings": 8192}, "sliding_window=4096 is below"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": ..., "max_window_layers": 1},
        "sliding_window=16 is below",
    ),
    (
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16},
        "sliding_window=16 is below",
    ),
    ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types has 'linear_attention'"),
    ("qwen3", {"layer_types": "chunked_attention"}, "layer_types has 'chunked_attention'"),
    ("mistral", {"sliding_window": 16, "use_sliding_window": False}, "sliding_window=16 is below"),
    ("mistral", {"sliding_window": "16"}, "sliding_window='16' is no number of tokens"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": ..., "max_window_layers": "1"},
        "max_window_layers='1' is no number",
    ),
    ("gpt2", {"activation_function": "relu"}, "activation_function='relu'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=false"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention=true"),
    ("gpt_neox", {"hidden_act": "relu"}, "hidden_act='relu' .* it can be 'gelu'"),
    ("gpt_neox", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'.*for gpt_neox"),
]


@pytest.mark.parametrize(("variant", "keys", "message"), REFUSED)
def test_what_is_not_computed_here_is_refused_by_name(
    saved: Callable[[str], Path], variant: str, keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = rewrite(saved(variant), tmp_path / "model", **keys)
    with pytest.raises(UserError, match=message):
        HuggingFaceWeights(folder)


FORMATS = [form for family in FAMILIES.values() for form in family.hugging_face]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.model_type)
def test_a_key_that_is_absent_means_what_it_means_to_transformers(form: HuggingFaceFormat) -> None:
    from transformers import AutoConfig

    theirs: Any = AutoConfig.for_model(form.model_type)
    for setting in form.settings:
        if setting.default is not REQUIRED:
            default = getattr(theirs, setting.theirs, None)
            derived = setting.default is None and setting.ours in ("num_key_value_heads", "head_dim")
            assert derived or setting.default == default, setting.theirs
    for fixed in form.fixed:
        assert getattr(theirs, fixed.theirs) in fixed.allowed
    if form.rotary:
        assert theirs.rope_parameters["rope_theta"] == 10000.0
        assert theirs.rope_parameters.get("partial_rotary_factor") == form.partial_rotary
    if form.always_slides:
        assert theirs.sliding_window == DEFAULT_WINDOW


def test_keys_that_are_absent(saved: Callable[[str], Path], tmp_path: Path) -> None:
    old = rewrite(saved("llama"), tmp_path / "old", num_key_value_heads=..., head_dim=..., rope_parameters=...)
    assert largest_difference(open_weights(old), old)[0] <= PARITY
    bare = rewrite(saved("gpt_neox"), tmp_path / "bare", rope_parameters=..., hidden_act=..., attention_bias=...)
    assert largest_difference(open_weights(bare), bare)[0] <= PARITY
    with pytest.raises(UserError, match="num_key_value_heads is missing"):
        open_weights(rewrite(saved("mistral"), tmp_path / "mistral", num_key_value_heads=...))


def test_a_window_no_shorter_than_the_sequences_changes_nothing(saved: Callable[[str], Path], tmp_path: Path) -> None:
    source = saved("mistral")
    assert HuggingFaceWeights(rewrite(source, tmp_path / "long", sliding_window=64)).model.max_position_embeddings == 64
    narrow = rewrite(source, tmp_path / "narrow", sliding_window=16)
    weights = HuggingFaceWeights(narrow, max_positions=16)
    assert weights.model.max_position_embeddings == 16
    difference, tokens = largest_difference(weights, narrow)
    assert (tokens, difference <= PARITY) == (32, True)
    with pytest.raises(UserError, match="--max-positions=65: .* has max_position_embeddings=64"):
        HuggingFaceWeights(source, max_positions=65)
    with pytest.raises(UserError, match="--max-positions=8: .* each has weights"):
        HuggingFaceWeights(saved("gpt2"), max_positions=8)


@pytest.mark.parametrize(
    "keys",
    [
        {"use_sliding_window": False, "max_window_layers": 1},
        {"use_sliding_window": True, "max_window_layers": 2},
        {"use_sliding_window": True, "max_window_layers": 70},
        {"use_sliding_window": True, "max_window_layers": ...},
    ],
)
def test_a_window_that_no_layer_has_changes_nothing(
    saved: Callable[[str], Path], keys: dict[str, Any], tmp_path: Path
) -> None:
    folder = rewrite(saved("qwen2"), tmp_path / "model", sliding_window=16, layer_types=..., **keys)
    weights = open_weights(folder)
    assert weights.model.max_position_embeddings == 64
    assert largest_difference(weights, folder)[0] <= PARITY


def test_keys_that_are_not_kept_are_told(saved: Callable[[str], Path], tmp_path: Path) -> None:
    no_window = {"use_sliding_window": False, "max_window_layers": 2, "layer_types": ["full_attention"] * 2}
    kept = HuggingFaceWeights(rewrite(saved("qwen2"), tmp_path / "kept", sliding_window=None, **no_window))
    assert not any("window" in note or "layer_types" in note for note in kept.notes)
    written = config_of(kept.model, "fp32", {})[1]
    assert {key: written[key] for key in no_window} == no_window
    assert written["sliding_window"] is None
    keys = {"sliding_window": 16, "use_sliding_window": False, "max_window_layers": 1, "layer_types": None}
    (note,) = HuggingFaceWeights(rewrite(saved("qwen2"), tmp_path / "dropped", **keys)).notes
    assert note.endswith("without: sliding_window, max_window_layers")
    (note,) = HuggingFaceWeights(rewrite(saved("mistral"), tmp_path / "mistral", sliding_window=64)).notes
    assert note.endswith("without: sliding_window")


def test_tensors_that_are_not_the_models_are_a_table(saved: Callable[[str], Path], tmp_path: Path) -> None:
    def change(held: dict[str, Tensor]) -> dict[str, Tensor]:
        del held["model.layers.1.mlp.up_proj.weight"]
        return held | {"score.weight": torch.ones(2, 32), "model.norm.weight": torch.ones(33)}

    with pytest.raises(UserError) as caught:
        open_weights(rewrite(saved("llama"), tmp_path / "other", change))
    rows = [line.split("  ") for line in str(caught.value).splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells[1:-1] == [
        ["config.json asks", "it holds"],
        ["model.layers.1.mlp.up_proj.weight", "48 x 32", "missing"],
        ["model.norm.weight", "32", "33"],
        ["score.weight", "missing", "2 x 32"],
    ]


def test_a_head_that_is_missing_may_be_tied(saved: Callable[[str], Path], tmp_path: Path) -> None:
    def without_head(held: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: one for name, one in held.items() if name != "lm_head.weight"}

    folder = rewrite(saved("llama"), tmp_path / "model", without_head)
    with pytest.raises(UserError, match="holds no lm_head.weight, and .*; if the head is model.embed_tokens.weight, "):
        open_weights(folder)
    open_weights(rewrite(folder, tmp_path / "tied", tie_word_embeddings=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_prove_nothing(saved: Callable[[str], Path], value: float, tmp_path: Path) -> None:
    def spoiled(held: dict[str, Tensor]) -> dict[str, Tensor]:
        return held | {"model.norm.weight": torch.full_like(held["model.norm.weight"], value)}

    good, bad = saved("llama"), rewrite(saved("llama"), tmp_path / "model", spoiled)
    for weights, folder in ((good, bad), (bad, good), (bad, bad)):
        with pytest.raises(UserError, match=r"model: [\d,]+ of 12,416 logits are infinite or no numbers"):
            largest_difference(open_weights(weights), folder)


def test_paths_count_from_the_folder_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"gone: there is no such folder in {tmp_path}; give a checkpoint"):
        open_weights(Path("gone"))
    Path("link").symlink_to("gone")
    with pytest.raises(UserError, match="link: is a link to gone, where there is nothing"):
        open_weights(Path("link"))


def test_other_elements_than_floats_are_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    double = rewrite(saved("llama"), tmp_path / "x", lambda held: {name: one.double() for name, one in held.items()})
    with pytest.raises(UserError, match="stored as F64; allowed: F32, BF16, F16"):
        open_weights(double)


class Planted:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {os.environ['PLANTED']}",)


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a planted file leaves its mark, should it ever run."""
    mark = tmp_path / "it ran"
    monkeypatch.setenv("PLANTED", str(mark))
    yield mark
    assert not mark.exists()


@pytest.mark.parametrize("name", ["model.pt", "weights.pkl", "pytorch_model-00001-of-00002.bin"])
def test_a_pickle_of_no_known_name_is_refused_and_never_opened(
    saved: Callable[[str], Path], name: str, planted: Path, tmp_path: Path
) -> None:
    folder = rewrite(saved("llama"), tmp_path / "model")
    torch.save(Planted(), folder / name)
    weights = HuggingFaceWeights(folder)  # beside safetensors it is not looked at, and that is told
    assert weights.notes == (f"not read: {name}, which may hold weights too",)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"holds {name}, which is not read"):
        open_weights(folder)


def pickled(source: Path, folder: Path, *, shards: int = 1, **options: Any) -> Path:
    """Copy a model with its tensors in files of torch's."""
    rewrite(source, folder)
    held = {name: one.clone() for name, one in tensors(source).items()}
    (folder / "model.safetensors").unlink()
    names = [f"pytorch_model-{number:05d}-of-{shards:05d}.bin" for number in range(1, shards + 1)]
    if shards == 1:
        names = ["pytorch_model.bin"]
    places = {name: names[at % shards] for at, name in enumerate(held)}
    for file in names:
        torch.save({name: one for name, one in held.items() if places[name] == file}, folder / file, **options)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("variant", ["llama, grouped and tied", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("options", [{}, {"shards": 3}, {"_use_new_zipfile_serialization": False}])
def test_files_of_torchs_are_read_as_plain_tensors(
    saved: Callable[[str], Path], variant: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = pickled(saved(variant), tmp_path / "model", **options)
    weights = open_weights(folder)
    assert (weights.precision, getattr(weights, "notes", None)) == ("bf16", ())
    assert_same_bits(saved(variant), export(weights, tmp_path / "back"))
    if "_use_new_zipfile_serialization" not in options:
        assert largest_difference(weights, folder)[0] <= PARITY


def test_half_precision_of_torchs_files(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = pickled(saved("llama"), tmp_path / "model")
    held = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({name: one.half() for name, one in held.items()}, folder / "pytorch_model.bin")
    weights = open_weights(folder)
    assert weights.precision == "fp16"
    out = np.empty(weights.shapes["final_norm.weight"], np.float32)
    weights.read("final_norm.weight", Region((0,), out.shape), out)
    assert np.array_equal(out, held["model.norm.weight"].half().float().numpy())
    torch.save({name: one.double() for name, one in held.items()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="stored as torch.float64; allowed: F32, BF16, F16"):
        open_weights(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: Planted(), "pytorch_model.bin: names .*system.*: code, which is never run"),
        (lambda: {"model.norm.weight": Planted()}, "pytorch_model.bin: names .*system.*: code, which is never run"),
        (lambda: {"state_dict": {"a": torch.ones(2)}}, "'state_dict' is dict, no tensor; save the state dict alone"),
        (lambda: [torch.ones(2)], "pytorch_model.bin: holds list, where a checkpoint holds a dict"),
        (lambda: {7: torch.ones(2)}, "'7' is Tensor, no tensor"),
    ],
)
def test_a_file_of_torchs_that_holds_more_than_tensors_is_refused(
    saved: Callable[[str], Path], content: Callable[[], Any], message: str, planted: Path, tmp_path: Path
) -> None:
    folder = pickled(saved("llama"), tmp_path / "model")
    torch.save(content(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=message):
        open_weights(folder)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("model.safetensors.index.json", "model.safetensors"),
        ("model.safetensors", "pytorch_model.bin"),
        ("model.safetensors", "pytorch_model.bin.index.json"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ],
)
def test_two_sets_of_weights_are_ambiguous(
    saved: Callable[[str], Path], first: str, second: str, planted: Path, tmp_path: Path
) -> None:
    folder = rewrite(saved("llama"), tmp_path / "model")
    if "pytorch" in first:
        shutil.rmtree(folder)
        folder = pickled(saved("llama"), folder, shards=2)
    if first == "model.safetensors.index.json":
        names = tensors(folder)
        shutil.copy(folder / "model.safetensors", folder / "part.safetensors")
        (folder / first).write_text(json.dumps({"weight_map": dict.fromkeys(names, "part.safetensors")}))
    elif not (folder / second).exists():
        torch.save(Planted(), folder / second)
    with pytest.raises(UserError, match=f"holds two sets of weights, {first} and {second}, and nothing says which"):
        open_weights(folder)
    (folder / second).unlink()
    open_weights(folder)


def test_what_lies_there_and_is_not_read_is_told(saved: Callable[[str], Path], tmp_path: Path) -> None:
    extra = {f"extra.{name}": torch.ones(1) for name in "abcd"}
    folder = rewrite(saved("llama"), tmp_path / "model", lambda held: held | extra)
    names = [name for name in tensors(folder) if not name.startswith("extra")]
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "part.safetensors")})
    )
    for name in ("consolidated.safetensors", "adapter_model.bin", "model.gguf", "README.md"):
        (folder / name).write_text("")
    assert HuggingFaceWeights(folder).notes == (
        "not read: extra.a, extra.b, extra.c and 1 more in part.safetensors, which the index does not name there",
        "not read: adapter_model.bin, consolidated.safetensors, model.gguf, which may hold weights too",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"its config.json cannot be read as JSON \(.*\), fetch the file again"),
        ("[1]", r"its config.json holds \[1\], where an object with a model_type is read"),
        ("{}", "its config.json has no model_type"),
        ('{"model_type": null}', "its config.json has model_type=null, where a name such as 'llama' is read"),
    ],
)
def test_a_config_that_describes_no_model_says_why(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path)


def test_code_of_the_folder_is_never_run(saved: Callable[[str], Path], planted: Path, tmp_path: Path) -> None:
    folder = rewrite(saved("llama"), tmp_path / "model")
    code = f"open({str(planted)!r}, 'w')\nfrom transformers import LlamaForCausalLM as Model, LlamaConfig as Config\n"
    (folder / "modeling_x.py").write_text(code)
    weights = open_weights(folder)
    auto_map = {"AutoConfig": "modeling_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    with pytest.raises(UserError, match="auto_map"):
        open_weights(folder)
    # Nor where transformers is asked to run it.
    assert largest_difference(weights, folder)[0] <= PARITY


def test_a_pickle_under_the_name_of_safetensors_is_refused(
    saved: Callable[[str], Path], planted: Path, tmp_path: Path
) -> None:
    folder = rewrite(saved("llama"), tmp_path / "model")
    torch.save(Planted(), folder / "model.safetensors")
    with pytest.raises(UserError, match="is no whole safetensors file"):
        open_weights(folder)


@pytest.mark.parametrize("cut", [4, 600, -7])
def test_a_file_that_was_cut_off_is_named(saved: Callable[[str], Path], cut: int, tmp_path: Path) -> None:
    folder = rewrite(saved("llama"), tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"model\.safetensors: is no whole safetensors file"):
        open_weights(folder)


def indexed(folder: Path, file: str) -> Path:
    """Turn a model of one file into one of an index that names `file` for every tensor."""
    names = tensors(folder)
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
    return folder


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "ABSOLUTE", "..", "", "a/../../elsewhere.safetensors"])
def test_names_in_an_index_that_leave_the_folder_are_refused(
    saved: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    name = str(tmp_path / "elsewhere.safetensors") if name == "ABSOLUTE" else name
    with pytest.raises(UserError, match="a model's files lie in its own folder"):
        open_weights(indexed(rewrite(saved("llama"), tmp_path / "model"), name))


def test_links_lead_to_weights_to_the_same_name_and_into_hugging_faces_cache(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = indexed(rewrite(saved("llama"), tmp_path / "model"), "part.safetensors")
    (folder / "part.safetensors").symlink_to("../elsewhere.safetensors")  # on a shared disk, say
    assert_same_bits(saved("llama"), export(open_weights(folder), tmp_path / "from the link"))
    whole = tmp_path / "links"
    whole.mkdir()
    for file in saved("llama").iterdir():
        (whole / file.name).symlink_to(file)
    assert_same_bits(saved("llama"), export(open_weights(whole), tmp_path / "from links"))
    inner = rewrite(saved("llama"), tmp_path / "inner")
    (inner / "files").mkdir()
    (inner / "config.json").rename(inner / "files/1")
    (inner / "config.json").symlink_to("files/1")
    open_weights(inner)
    (tmp_path / "secret").write_text("of this machine")
    (whole / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="is a link to .*secret, a file of another name outside the folder"):
        _ = open_weights(whole).model_files
    (whole / "model.safetensors").unlink()
    (whole / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="holds no tensors|is a link to .*gone, where there is no file"):
        open_weights(whole)
    cache = tmp_path / "models--someone--model"
    snapshot, blobs = cache / "snapshots" / "0123abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(saved("llama").iterdir()):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert_same_bits(saved("llama"), export(open_weights(snapshot), tmp_path / "back"))


def test_an_index_that_says_what_its_files_do_not_hold(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = rewrite(saved("llama"), tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "model.safetensors"}}))
    with pytest.raises(UserError, match="says that model.safetensors holds a.weight, which it does not"):
        open_weights(folder)
    index.write_text(json.dumps({"weight_map": {"a.weight": "gone.safetensors"}}))
    with pytest.raises(UserError, match="has no gone.safetensors"):
        open_weights(folder)
    index.write_text(json.dumps({"weight_map": ["a"]}))
    with pytest.raises(UserError, match="has no weight_map"):
        open_weights(folder)
    index.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        open_weights(folder)


def test_a_folder_without_tensors(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = rewrite(saved("llama"), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no tensors"):
        open_weights(folder)


def test_a_checkpoint_of_weights_alone_says_what_it_is(saved: Callable[[str], Path], tmp_path: Path) -> None:
    source = saved("qwen3")
    held = import_(open_weights(source), tmp_path / "step_0")
    assert isinstance(held.model, LlamaConfig)
    assert held.model.qk_norm
    assert held.model.vocab_size == SIZES["vocab_size"]
    assert list(held.model_files) == ["generation_config.json"]
    assert json.loads((tmp_path / "step_0" / "state.json").read_text()) == {"step": 0}
    config = json.loads((export(held, tmp_path / "back") / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
