"""Megatron's checkpoints are read as the weights that they were made of: every tensor, any box, the same losses."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron_files as files
import numpy as np
import pytest
import torch
from megatron_files import GPT2, GROUPED, LLAMA, ROTARY_GPT, Made, make
from reference_model import ReferenceModel

from megalite.cli import main
from megalite.convert.megatron.reader import MegatronWeights
from megalite.convert.megatron.torch_file import read_torch_file
from megalite.convert.open import open_weights
from megalite.errors import UserError
from megalite.model.load import load_stage
from megalite.model.microbatch import Microbatch
from megalite.model.stage import Stage
from megalite.model.weights import Weights
from megalite.parallel.regions import Region
from megalite.parallel.tensor_group import TensorGroup

pytestmark = pytest.mark.slow

FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "grouped": GROUPED, "rotary gpt": ROTARY_GPT}
WRITERS: dict[str, Callable[[Path, Made], Path]] = {
    "megatron-lm": files.write_megatron_lm,
    "deepspeed": files.write_deepspeed,
    "pipeline module": files.write_pipeline_module,
}


def read_whole(weights: Weights, name: str) -> np.ndarray:
    shape = weights.shapes[name]
    out = np.full(shape, np.nan, np.float32)
    weights.read(name, Region.whole(shape), out)
    return out


def assert_holds(weights: MegatronWeights, made: Made) -> None:
    """Every tensor, whole and in two boxes across all dims, bit by bit."""
    assert weights.model == made.model
    assert weights.shapes == {name: tuple(tensor.shape) for name, tensor in made.weights.items()}
    for name, tensor in made.weights.items():
        np.testing.assert_array_equal(read_whole(weights, name), tensor.numpy(), err_msg=name)
        for start, stop in ((0.2, 0.7), (0.4, 1.0)):
            corners = [
                (int(length * start), max(int(length * start) + 1, int(length * stop))) for length in tensor.shape
            ]
            region = Region(tuple(a for a, _ in corners), tuple(b - a for a, b in corners))
            out = np.full(region.shape, np.nan, np.float32)
            weights.read(name, region, out)
            np.testing.assert_array_equal(out, tensor.numpy()[region.slices], err_msg=f"{name} {region}")


def refusal(path: Path, **how: Any) -> str:
    with pytest.raises(UserError) as raised:
        MegatronWeights(path, **how)
    return str(raised.value)


@pytest.mark.parametrize("fields", FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize("names", ["old", "legacy", "core", "fused"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_every_tensor_of_megatron_lm(
    tmp_path: Path, fields: dict[str, Any], names: str, tensor: int, pipeline: int
) -> None:
    made = make(fields, names=names, tensor=tensor, pipeline=pipeline)
    files.write_megatron_lm(tmp_path, made)
    assert_holds(MegatronWeights(tmp_path), made)


@pytest.mark.parametrize("version", [0.0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("fields", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_every_packing_of_queries_keys_and_values(
    tmp_path: Path, version: float, fields: dict[str, Any], tensor: int
) -> None:
    made = make(fields, version=version, tensor=tensor)
    files.write_megatron_lm(tmp_path, made)
    assert_holds(MegatronWeights(tmp_path), made)


def test_a_file_that_tells_no_version_is_of_the_first_unless_its_names_are_newer(tmp_path: Path) -> None:
    for names, version in (("old", 0.0), ("core", 3.0)):
        made = make(GPT2, names=names, version=version)
        folder = files.write_megatron_lm(tmp_path / names, made)
        path = folder / "mp_rank_00" / "model_optim_rng.pt"
        content = {"model": files.stage(made, range(4), 0, first=True, last=True), "args": made.args()}
        torch.save(content, path)
        weights = MegatronWeights(tmp_path / names)
        assert_holds(weights, made)
        assert ("its files tell no checkpoint_version" in " ".join(weights.notes)) == (names == "old")


@pytest.mark.parametrize("fields", [GPT2 | {"tie_word_embeddings": False}, GROUPED], ids=["gpt2", "grouped"])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("write", [files.write_deepspeed, files.write_pipeline_module])
def test_every_tensor_of_megatron_deepspeed(
    tmp_path: Path, fields: dict[str, Any], tensor: int, write: Callable[[Path, Made], Path]
) -> None:
    made = make(fields, tensor=tensor)
    write(tmp_path, made)
    assert_holds(MegatronWeights(tmp_path), made)


def test_virtual_stages_are_put_in_order(tmp_path: Path) -> None:
    made = make(LLAMA, pipeline=2, virtual=2, names="core")
    files.write_megatron_lm(tmp_path, made)
    assert_holds(MegatronWeights(tmp_path), made)


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_half_precision_is_read_exactly(tmp_path: Path, dtype: torch.dtype, precision: str) -> None:
    made = make(GROUPED, tensor=2, dtype=dtype)
    files.write_megatron_lm(tmp_path, made)
    weights = MegatronWeights(tmp_path)
    assert weights.precision == precision
    assert_holds(weights, made)


def test_norms_that_are_stored_as_what_they_add_to_one(tmp_path: Path) -> None:
    made = make(GPT2, options=(("apply_layernorm_1p", True),))
    files.write_megatron_lm(tmp_path, made)
    weights = MegatronWeights(tmp_path)
    for name in ("layers.1.mlp_norm.weight", "final_norm.weight"):
        np.testing.assert_array_equal(read_whole(weights, name), made.weights[name].numpy() + np.float32(1))
    for name in ("layers.1.mlp_norm.bias", "layers.1.mlp.up.bias", "embedding.tokens.weight"):
        np.testing.assert_array_equal(read_whole(weights, name), made.weights[name].numpy())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells a mapping by Linux's list of them")
def test_files_are_mapped_and_not_loaded(tmp_path: Path) -> None:
    folder = files.write_megatron_lm(tmp_path, make(GPT2))
    weights = MegatronWeights(tmp_path)
    assert str(folder / "mp_rank_00" / "model_optim_rng.pt") in Path("/proc/self/maps").read_text()
    assert read_whole(weights, "final_norm.weight").shape == (16,)


def test_files_of_torch_before_1_6(tmp_path: Path) -> None:
    made = replace(make(GPT2, version=0.0), with_args=False)
    files.write_megatron_lm(tmp_path, made, zipped=False)
    (tmp_path / "model.json").write_text(json.dumps(GPT2))
    assert_holds(MegatronWeights(tmp_path), made)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize("fields", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_stage_loaded_from_it_has_the_same_losses(
    tmp_path: Path, fields: dict[str, Any], write: Callable[[Path, Made], Path]
) -> None:
    made = make(fields, tensor=2)
    write(tmp_path, made)
    weights = open_weights(tmp_path)
    assert isinstance(weights, MegatronWeights)
    model = weights.model
    loaded = Stage(model, range(model.num_hidden_layers), index=0, num_stages=1, group=TensorGroup())
    load_stage(loaded, weights)
    tokens = torch.randint(0, 45, (2, 11), generator=torch.Generator().manual_seed(2))
    expected = ReferenceModel(made.model, dict(made.weights))(tokens[:, :-1], tokens[:, 1:])
    found = loaded({}, microbatch=Microbatch(tokens[:, :-1], tokens[:, 1:])).losses["loss"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_folder_and_the_folder_above_are_the_same_checkpoint(tmp_path: Path) -> None:
    made = make(LLAMA)
    folder = files.write_megatron_lm(tmp_path, made)
    assert MegatronWeights(folder).origin == MegatronWeights(tmp_path).origin == folder
    folder.rename(tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert MegatronWeights(tmp_path).origin == tmp_path / "release"


@pytest.mark.parametrize("word", ["../elsewhere/global_step1000", "{}/elsewhere/global_step1000", "..", "", "gone"])
def test_a_tracker_that_leaves_the_folder_is_not_followed(tmp_path: Path, word: str) -> None:
    files.write_deepspeed(tmp_path / "elsewhere", make(LLAMA))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").write_text(word.format(tmp_path))
    assert "no checkpoint of Megatron's" in refusal(tmp_path / "run")


def test_a_tokenizer_of_numbers_has_an_end_of_document_more(tmp_path: Path) -> None:
    made = make(LLAMA, options=(("vocab_size", 44), ("tokenizer_type", "NullTokenizer")))
    files.write_megatron_lm(tmp_path, made)
    assert_holds(MegatronWeights(tmp_path), made)


def test_a_vocabulary_that_nothing_tells_stays_padded(tmp_path: Path) -> None:
    made = make(LLAMA, tensor=2, options=(("vocab_size", None),))
    folder = files.write_megatron_lm(tmp_path, made)
    weights = MegatronWeights(tmp_path)
    assert weights.model.vocab_size == 48
    assert weights.notes == (
        "the vocabulary has 48 rows, and its tokenizer may have fewer ids; to cut what is padding, write "
        f'{{"vocab_size": IDS}} as {folder}/model.json',
    )
    (folder / "model.json").write_text('{"vocab_size": 45}')
    cut = MegatronWeights(tmp_path)
    assert_holds(cut, made)
    assert cut.notes == ("the vocabulary's 48 rows are cut to the 45 of vocab_size",)


def test_a_section_model_stands_in_for_options(tmp_path: Path) -> None:
    made = make(GROUPED, tensor=2, with_args=False)
    folder = files.write_pipeline_module(tmp_path, made, model_states=False)
    assert refusal(tmp_path) == (
        f"{folder}: does not tell the options of the run that wrote it; write the section model of a run file, "
        f"architecture and all, as {folder}/model.json"
    )
    run_file = tmp_path / "run.yaml"
    run_file.write_text(f"model: {json.dumps(GROUPED)}\ntrain: {{steps: 3}}\n")
    assert_holds(MegatronWeights(tmp_path, run_file), made)
    (folder / "model.json").write_text(json.dumps(GROUPED))
    assert_holds(MegatronWeights(tmp_path), made)


def test_it_is_converted_into_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make(GROUPED, tensor=2, pipeline=2, names="core", options=(("vocab_size", None),), dtype=torch.bfloat16)
    files.write_megatron_lm(tmp_path / "theirs", made)
    section = tmp_path / "model.json"
    section.write_text('{"vocab_size": 45}')
    words = ["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--model", str(section)]
    assert main(words) == 0
    assert "note: the vocabulary's 48 rows are cut to the 45 of vocab_size\n" in capsys.readouterr().out
    weights = open_weights(tmp_path / "ours")
    assert weights.model == made.model
    assert weights.precision == "bf16"
    for name, tensor in made.weights.items():
        np.testing.assert_array_equal(read_whole(weights, name), tensor.numpy(), err_msg=name)
    assert main([*words[:1], str(tmp_path / "ours"), str(tmp_path / "again"), *words[3:]]) == 2
    assert "belongs to Megatron's checkpoints" in capsys.readouterr().err


def test_a_tokenizer_beside_it_goes_along(tmp_path: Path) -> None:
    folder = files.write_deepspeed(tmp_path, make(LLAMA))
    (folder / "tokenizer.model").write_bytes(b"pieces")
    assert MegatronWeights(tmp_path).model_files == {"tokenizer.model": folder / "tokenizer.model"}


@pytest.mark.parametrize(
    ("fields", "options", "problem"),
    [
        (LLAMA, {"rotary_interleaved": True}, "rotary_interleaved=True: a model that megalite has not"),
        (LLAMA, {"num_experts": 8}, "num_experts=8: a model that megalite has not"),
        (LLAMA, {"num_experts": [4]}, "num_experts=[4]: a model that megalite has not"),
        (LLAMA, {"softmax_type": "learnable"}, "softmax_type=learnable: a model that megalite has not"),
        (LLAMA, {"window_size": (128, 0)}, "window_size=(128, 0): a model that megalite has not"),
        (LLAMA, {"rotary_percent": 0.5}, "rotary_percent=0.5 with swiglu"),
        (GPT2, {"position_embedding_type": "alibi"}, "position_embedding_type=alibi"),
        (GPT2, {"bias_gelu_fusion": False}, "its GELU is the exact one"),
        (GPT2, {"hidden_size": None}, "its options lack hidden_size; write the section model"),
        (GPT2, {"num_attention_heads": 3, "kv_channels": None}, "megalite's: model: num_attention_heads=3 does not"),
        (LLAMA, {"num_layers": 5}, "layers.4.attention_norm.weight 16 missing"),
        (LLAMA, {"num_layers": 3}, "layers.3.attention_norm.weight missing 2 shards of 16"),
        (
            LLAMA,
            {"ffn_hidden_size": 28},
            "layers.0.mlp.gate.weight 28 x 16 2 shards of 24 x 16",
        ),
        (LLAMA, {"vocab_size": 49}, "embedding.tokens.weight 49 x 16 2 shards of 24 x 16"),
    ],
)
def test_another_model_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], options: dict[str, object], problem: str
) -> None:
    files.write_megatron_lm(tmp_path, make(fields, tensor=2, options=tuple(options.items())))
    message = refusal(tmp_path)
    assert " ".join(problem.split()) in " ".join(message.split())
    assert message.startswith(str(tmp_path / "iter_0001000"))


def test_grouped_queries_in_an_old_packing_are_refused(tmp_path: Path) -> None:
    options = (("group_query_attention", True), ("num_query_groups", 2))
    files.write_megatron_lm(tmp_path, make(LLAMA, version=1.0, options=options))
    assert "checkpoint_version=1.0 with grouped queries" in refusal(tmp_path)


@pytest.mark.parametrize(("options", "tanh"), [({}, True), ({"bias_gelu_fusion": False}, False)])
def test_the_form_of_gelu_is_what_the_options_give(tmp_path: Path, options: dict[str, object], tanh: bool) -> None:
    files.write_megatron_lm(tmp_path, make(ROTARY_GPT, options=tuple(options.items())))
    assert getattr(MegatronWeights(tmp_path).model, "hidden_act") == ("gelu_tanh" if tanh else "gelu")  # noqa: B009


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({}, None),
        ({"rotary_seq_len_interpolation_factor": 4}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"use_rope_scaling": True, "rope_scaling_factor": 32.0, "rotary_base": 500000},
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
)
def test_rotary_positions_are_scaled_as_the_options_say(
    tmp_path: Path, options: dict[str, object], scaling: dict[str, object] | None
) -> None:
    files.write_megatron_lm(tmp_path, make(LLAMA, options=tuple(options.items())))
    section = MegatronWeights(tmp_path).model.model_dump(exclude_none=True)
    assert section.get("rope_scaling") == scaling
    assert section["rope_theta"] == options.get("rotary_base", 10000.0)


@pytest.mark.parametrize(
    ("lost", "problem"),
    [
        ("mp_rank_01_000", "lacks the files of 1 ranks: (tensor 1, pipeline 0)"),
        ("mp_rank_00_001", "lacks the files of 1 ranks: (tensor 0, pipeline 1)"),
    ],
)
def test_files_that_are_missing_are_named(tmp_path: Path, lost: str, problem: str) -> None:
    folder = files.write_megatron_lm(tmp_path, make(LLAMA, tensor=2, pipeline=2))
    (folder / lost / "model_optim_rng.pt").unlink()
    assert problem in refusal(tmp_path)


def test_a_layer_file_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = files.write_pipeline_module(tmp_path, make(LLAMA, tensor=2))
    (folder / "layer_04-model_01-model_states.pt").unlink()
    assert "lacks files of layer_04, one a tensor rank" in refusal(tmp_path)
    (folder / "layer_04-model_00-model_states.pt").unlink()
    assert re.search(r"layers.3.attention_norm.weight +16 +missing", refusal(tmp_path))


def test_weights_that_zero_3_divided_are_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "global_step5"
    files.save(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt", {"module": {}})
    (tmp_path / "latest").write_text(folder.name)
    assert "has its weights divided by ZeRO-3, which is not read" in refusal(tmp_path)


def test_layers_of_a_pipeline_module_without_a_tensor_axis(tmp_path: Path) -> None:
    made = make(GPT2)
    folder = files.write_pipeline_module(tmp_path, made)
    for path in folder.glob("layer_*"):
        path.rename(folder / path.name.replace("-model_00-", "-"))
    assert_holds(MegatronWeights(tmp_path), made)


def test_the_distributed_format_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000010"
    folder.mkdir()
    for name in ("common.pt", "metadata.json", ".metadata", "__0_0.distcp"):
        (folder / name).write_bytes(b"")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    assert "Megatron's distributed format, which is not read" in refusal(tmp_path)


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.code,)


class Member:
    """A member of an enumeration, as Python 3.11.0 to 3.11.3 write it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, ("text", "upper")


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "before 1.6"])
def test_a_member_by_its_name_is_forgotten_and_not_looked_up(tmp_path: Path, zipped: bool) -> None:
    torch.save({"member": Member()}, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    assert repr(read_torch_file(tmp_path / "file.pt")["member"]) == "(an object of its program)"


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "before 1.6"])
@pytest.mark.parametrize("where", ["model", "args", "rng_state", "optimizer"])
def test_code_in_a_file_is_never_run(tmp_path: Path, where: str, zipped: bool) -> None:
    made, mark = make(LLAMA), tmp_path / "ran"
    files.write_megatron_lm(tmp_path, made)
    path = tmp_path / "iter_0001000" / "mp_rank_00" / "model_optim_rng.pt"
    content = files.around(made) | {
        "model": files.stage(made, range(4), 0, first=True, last=True),
        where: Planted(f"open({str(mark)!r}, 'w')"),
    }
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refusal(tmp_path)
    assert str(path) in message
    assert "exec" in message
    assert not mark.exists()
    torch.load(path, weights_only=False)  # what was planted does run where it is let
    assert mark.exists()


@pytest.mark.parametrize("path", ["layer_03-model_00-model_states.pt", "mp_rank_00_model_states.pt"])
def test_code_in_deepspeeds_files_is_never_run(tmp_path: Path, path: str) -> None:
    mark = tmp_path / "ran"
    folder = files.write_pipeline_module(tmp_path, make(LLAMA))
    torch.save({"module": None, "weight": Planted(f"open({str(mark)!r}, 'w')")}, folder / path)
    assert "code, which is never run" in refusal(tmp_path)
    assert not mark.exists()


def test_objects_of_the_trainer_are_forgotten_not_made(tmp_path: Path) -> None:
    """A name of Megatron's stands for nothing, though a module of that name can be imported."""
    made, mark = make(LLAMA), tmp_path / "ran"
    module = tmp_path / "planted" / "megatron" / "__init__.py"
    module.parent.mkdir(parents=True)
    module.write_text(f"open({str(mark)!r}, 'w')\n")
    files.write_megatron_lm(tmp_path, made)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path / "planted")
        assert_holds(MegatronWeights(tmp_path), made)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q\x00.", b"PK\x03\x04 not an archive", bytes(100)])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    files.write_megatron_lm(tmp_path, make(LLAMA))
    path = tmp_path / "iter_0001000" / "mp_rank_00" / "model_optim_rng.pt"
    path.write_bytes(content)
    assert refusal(tmp_path).startswith(f"{path}: ")


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    files.write_megatron_lm(tmp_path, make(LLAMA))
    path = tmp_path / "iter_0001000" / "mp_rank_00" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:-5000])
    assert refusal(tmp_path).startswith(f"{path}: cannot be read as tensors and plain data")
