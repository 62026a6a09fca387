"""The registry of model families, and a family that a plugin adds: the one of docs/howto/add_a_model_family.md."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
import yaml
from plugin_family import plugin_family
from pydantic import TypeAdapter
from reference_model import stage_shapes
from torch import nn

from megalite.checkpoint.weights import CheckpointWeights
from megalite.cli.plugin_option import load_plugins
from megalite.config import ModelConfig, load_run_config, read_model
from megalite.config.sections import AnyFamily
from megalite.convert.conversion import to_checkpoint, to_hugging_face
from megalite.convert.huggingface.reader import HuggingFaceWeights
from megalite.convert.huggingface.tensor_map import tensors_of
from megalite.convert.logits_check import largest_difference
from megalite.convert.open import open_weights
from megalite.errors import UserError
from megalite.model.builder import ModelBuilder
from megalite.model.family import Family
from megalite.model.formats.hugging_face import HuggingFaceFormat, Module
from megalite.model.registry import FAMILIES, register_family
from megalite.model.structure import flops_per_token, weight_shapes
from megalite.planning.parameter_count import ParameterCounts
from megalite.planning.plan import prepare

SIZES: dict[str, Any] = {
    "vocab_size": 45,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
RUN: dict[str, Any] = {
    "plugins": ["starcoder2"],
    "run": {"dir": "runs/x"},
    "model": {"architecture": "starcoder2", **SIZES},
    "data": {"sequence_length": 8, "train": [{"prefix": "corpus"}]},
    "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
}
NAMES: dict[str, Any] = {
    "layer": "layers.{}",
    "layers": (),
    "embedding": (),
    "norm": Module("norm", ("final_norm",)),
}


class ToyConfig(ModelConfig, frozen=True):
    architecture: Literal["toy"]

    def layer_kind(self, layer: int) -> bool:
        return layer % 2 == 0


class ToyLayer(nn.Linear):
    def flops_per_token(self, sequence_length: int) -> float:
        return 10.0 * self.in_features / 16


class ToyBuilder(ModelBuilder[ToyConfig]):
    def norm(self) -> nn.Module:
        return nn.RMSNorm(self.config.hidden_size)

    def block(self, layer: int) -> nn.Module:
        return ToyLayer(16 if layer % 2 else 32, 16, bias=False)


@pytest.fixture(autouse=True)
def run_file(tmp_path: Path) -> Iterator[Path]:
    """A run file, with the package that it names beside it in the working directory."""
    with plugin_family(tmp_path):
        Path("run.yaml").write_text(yaml.safe_dump(RUN))
        yield Path("run.yaml")


def test_the_run_file_has_the_keys_of_the_family(run_file: Path) -> None:
    model = load_run_config(run_file, ["model.norm_epsilon=1e-6"]).model
    assert type(model).__name__ == "StarCoder2Config"
    assert model.model_dump()["norm_epsilon"] == 1e-6
    assert load_run_config(run_file).to_yaml().startswith("run:")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.norm_epsilon=0", "model.norm_epsilon=0 is not a number above 0"),
        ("model.norm_eps=0", "model.norm_eps is not a key; did you mean"),
        ("model.num_key_value_heads=3", "model.num_key_value_heads=3 does not divide model.num_attention_heads=4"),
        (
            "model.architecture=starcoder",
            "'starcoder' is not 'llama', 'gpt2', 'gpt_neox' or 'starcoder2'; did you mean",
        ),
    ],
)
def test_messages_know_the_family(run_file: Path, override: str, words: str) -> None:
    with pytest.raises(UserError, match="command line") as raised:
        load_run_config(run_file, [override])
    assert words in str(raised.value)


def test_without_the_plugin_there_is_no_such_family(run_file: Path) -> None:
    with pytest.raises(UserError) as raised:
        load_run_config(run_file, ["plugins=null"])
    assert str(raised.value) == "run.yaml: model.architecture='starcoder2' is not 'llama', 'gpt2' or 'gpt_neox'"


def test_the_schema_of_a_run_file_has_every_family(run_file: Path) -> None:
    load_run_config(run_file)
    definitions = TypeAdapter(Annotated[ModelConfig, AnyFamily()]).json_schema()["$defs"]
    assert {"LlamaConfig", "GPT2Config", "GPTNeoXConfig", "StarCoder2Config"} <= definitions.keys()


def test_its_structure_follows_from_its_modules(run_file: Path) -> None:
    model = load_run_config(run_file, ["model.tie_word_embeddings=true"]).model
    shapes = weight_shapes(model)
    assert dict(shapes) == stage_shapes(model)
    assert shapes["layers.2.attention.key.bias"] == (8,)
    products = sum(rows * columns for rows, columns in (s for n, s in shapes.items() if "layers" in n and len(s) == 2))
    assert flops_per_token(model, 8) == 6 * (products + 45 * 16) + 12 * 3 * 16 * 8


@pytest.mark.slow
def test_it_converts_as_transformers_has_it(run_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    load_run_config(run_file)
    torch.manual_seed(0)
    theirs = Starcoder2ForCausalLM(Starcoder2Config(**SIZES, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "hf")
    weights = open_weights(tmp_path / "hf")
    assert isinstance(weights, HuggingFaceWeights)
    assert largest_difference(weights, tmp_path / "hf")[0] <= 1e-5
    to_checkpoint(weights, weights.model_files, tmp_path / "step_0", lambda done, total: None)
    held = open_weights(tmp_path / "step_0")
    assert isinstance(held, CheckpointWeights)
    to_hugging_face(
        *(held, held.model_files, tmp_path / "back", lambda done, total: None),
        precision="fp32",
        max_shard_bytes=1 << 30,
    )
    there, back = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert there.keys() == back.keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in there.items())


@pytest.mark.slow
def test_a_checkpoint_of_an_unknown_family_asks_for_its_plugin(run_file: Path, tmp_path: Path) -> None:
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    load_run_config(run_file)
    Starcoder2ForCausalLM(Starcoder2Config(**SIZES, bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path / "hf")
    weights = open_weights(tmp_path / "hf")
    to_checkpoint(weights, weights.model_files, tmp_path / "step_0", lambda done, total: None)
    del FAMILIES._values["starcoder2"]  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(UserError, match="'starcoder2' is not 'llama', .*; name the module .* with --plugin"):
        open_weights(tmp_path / "step_0")


def test_layers_of_several_kinds_have_their_own_shapes() -> None:
    register_family(Family(ToyConfig, builder=f"{__name__}:ToyBuilder"))
    model = read_model({"architecture": "toy", **SIZES, "num_hidden_layers": 5})
    assert dict(weight_shapes(model)) == stage_shapes(model)
    assert {n: s for n, s in weight_shapes(model).items() if "layers" in n} == {
        f"layers.{layer}.weight": (16, 16 if layer % 2 else 32) for layer in range(5)
    }
    assert flops_per_token(model, 8) == 6 * 45 * 16 + 2 * 10 + 3 * 20


def test_parameters_are_counted_by_the_kinds_of_a_stages_layers() -> None:
    register_family(Family(ToyConfig, builder=f"{__name__}:ToyBuilder"))
    model = {"architecture": "toy", **SIZES, "num_hidden_layers": 4}
    sizes = {"parallel": {"pipeline": 4, "data": 1}, "train": RUN["train"] | {"global_batch_size": 4}}
    Path("toy.yaml").write_text(yaml.safe_dump(RUN | {"plugins": None, "model": model} | sizes))
    counts = ParameterCounts(prepare(Path("toy.yaml"), [], None))
    ends = 45 * 16
    assert [counts.of_rank(rank) for rank in range(4)] == [ends + 512, 256, 512, 256 + 16 + ends]


def test_a_format_has_a_place_for_every_weight() -> None:
    form = HuggingFaceFormat("toy", "ToyForCausalLM", (), "", rotary=False, **NAMES)
    register_family(Family(ToyConfig, builder=f"{__name__}:ToyBuilder", hugging_face=(form,)))
    with pytest.raises(UserError, match=r"toy: the format says nothing of embedding\.tokens\.weight, a weight of toy"):
        tensors_of(form, read_model({"architecture": "toy", **SIZES}))


def test_a_name_belongs_to_one_family() -> None:
    class OtherConfig(ModelConfig, frozen=True):
        architecture: Literal["llama"]

    with pytest.raises(ValueError, match="the model family 'llama' is registered already, by .*config.py"):
        register_family(Family(OtherConfig, builder="nowhere:Builder"))
    form = HuggingFaceFormat("qwen2", "Qwen2ForCausalLM", (), "", **NAMES)
    with pytest.raises(ValueError, match="model_type 'qwen2' is read by the family llama already"):
        register_family(Family(ToyConfig, builder="nowhere:Builder", hugging_face=(form,)))
    with pytest.raises(ValueError, match="ModelConfig names no family: write architecture: Literal"):
        register_family(Family(ModelConfig, builder="nowhere:Builder"))
    assert list(FAMILIES) == ["llama", "gpt2", "gpt_neox"]


def test_a_plugin_of_the_command_line_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match="--plugin: plugins.0='starcoder' is neither .*; did you mean 'starcoder2'"):
        load_plugins(["starcoder"])
    load_plugins(["starcoder2"])
    assert "starcoder2" in FAMILIES
