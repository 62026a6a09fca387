"""A chat model of Hugging Face's is trained on conversations, and goes back as the model that it was: it ends its
answers, with the template, the special tokens and the generation settings of its folder."""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from generating import GREEDY, continued
from harness import run_distributed
from resuming import run_on_rank

from megalite.checkpoint import store
from megalite.checkpoint.manifest import WEIGHT_KIND
from megalite.checkpoint.model_files import run_model_files, tokenizer_model_files
from megalite.checkpoint.reader import CheckpointReader
from megalite.checkpoint.special_tokens import end_token_ids, named_token
from megalite.checkpoint.store import Part
from megalite.cli import main
from megalite.convert.open import open_weights
from megalite.errors import UserError
from megalite.generation.request import Limits
from megalite.generation.tokenization import open_vocabulary
from megalite.parallel.regions import Region
from megalite.planning.plan import prepare
from megalite.planning.preflight import check_start

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "Very well, thank you."
GENERATION = '{"eos_token_id": [2, 0], "pad_token_id": 0, "do_sample": true, "temperature": 0.7}'
KEPT = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like Qwen2.5-Instruct's, random and small; 2 is ``<|im_end|>`` and 0 ``<|endoftext|>``."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("hub") / "chat"
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([f"user assistant {ANSWER} How are you?"] * 9, trainer)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    ends = {"bos_token_id": 0, "eos_token_id": 2, "tie_word_embeddings": True, "rope_theta": 1e6}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=304, **sizes, **heads, **ends)).save_pretrained(folder)
    made.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "bos_token": None, "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    (folder / "added_tokens.json").write_text(json.dumps({name: at for at, name in enumerate(special)}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(GENERATION)
    return folder


@pytest.fixture(scope="module")
def conversations(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conversations")
    record = {"messages": [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": ANSWER}]}
    (folder / "chat.jsonl").write_text(f"{json.dumps(record)}\n" * 60)
    words = [str(folder / "chat.jsonl"), "--output", str(folder / "chat"), "--tokenizer", str(chat_model)]
    assert main(["preprocess", *words, "--chat", "chatml", "--workers", "1"]) == 0
    return folder / "chat"


def write_run(folder: Path, prefix: Path, **more: Any) -> Path:
    """Write a run file without a section `model`."""
    document: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "seed": 5},
        "data": {"sequence_length": 48, "train": [{"prefix": str(prefix)}]},
        "train": {
            "steps": 60,
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "optimizer": {"name": "adamw", "lr": 5.0e-3},
            "schedule": {"name": "cosine", "min_lr": 1.0e-4},
        },
        "checkpoint": {"every": 60},
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }
    document |= more
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def saved(path: Path, overrides: Sequence[str] = ()) -> Path:
    """What a run would save after its first step, but for the elements, which are 0, without running it."""
    plan = prepare(path, overrides, 1)
    folder = plan.checkpoints / "step_1"
    kinds = (WEIGHT_KIND, *plan.requirements.optimizer.state_tensors)
    shapes = {f"{kind}/{name}": shape for kind in kinds for name, shape in plan.requirements.shapes.items()}
    parts = [
        Part(name, shape, Region.whole(shape), partial(np.zeros, shape, np.float32)) for name, shape in shapes.items()
    ]
    store.begin(folder)
    store.write_rank(folder, 0, parts)
    store.finish(folder, ranks=1, manifest=plan.manifest(1), state={"step": 1}, files=plan.model_files())
    return folder


@pytest.mark.full
def test_a_chat_model_ends_its_answers_after_training_and_after_conversion(
    chat_model: Path, conversations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = shutil.copytree(chat_model, tmp_path / "source")
    path = write_run(tmp_path, conversations, init_from=str(source))
    overrides = [f"data.tokenizer={source}"]
    run_distributed(run_on_rank, 1, str(path), overrides)
    step, notes = run_distributed(run_on_rank, 1, str(path), overrides)[0]
    assert step == 60
    assert f"init_from={source} is ignored, " in "\n".join(notes)
    shutil.rmtree(source)  # the run has all that it needs
    reader = CheckpointReader(tmp_path / "run/checkpoints/step_60")
    assert reader.problems() == []
    for name in (*KEPT, "generation_config.json"):
        assert name in reader.manifest.files
        assert (reader.folder / name).read_bytes() == (chat_model / name).read_bytes()
    row = continued(tmp_path / "run", [QUESTION], GREEDY, Limits(20))[0]
    assert (row.text, row.reason) == (ANSWER, "end")
    assert row.tokens[-1] == 2

    out = tmp_path / "out"
    assert main(["convert", str(tmp_path / "run"), str(out)]) == 0
    for name in (*KEPT, "generation_config.json"):
        assert (out / name).read_bytes() == (chat_model / name).read_bytes()
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [2, 0]
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    theirs = AutoTokenizer.from_pretrained(chat_model)
    messages = [{"role": "user", "content": "How are you?"}]
    said = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert said == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == QUESTION
    assert tokenizer.special_tokens_map == theirs.special_tokens_map
    ids = torch.tensor([tokenizer.encode(QUESTION)])
    assert ids[0].tolist() == row.prompt_ids
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
    assert made[0, ids.shape[1] :].tolist() == row.tokens
    capsys.readouterr()


def test_what_weights_and_tokenizer_tell_of_the_model_need_not_be_written_again(
    chat_model: Path, conversations: Path, tmp_path: Path
) -> None:
    path = write_run(tmp_path, conversations, init_from=str(chat_model))
    plan = prepare(path, [], 1)
    model = plan.config.model
    assert (model.hidden_size, model.num_key_value_heads, model.vocab_size) == (64, 2, 304)
    assert getattr(model, "attention_bias", False)
    assert getattr(model, "rope_theta", None) == 1e6
    assert check_start(plan) == f"start: with the weights of {chat_model}"
    # The tokenizer of the weights is the run's where the run file names none, and the data were made with it.
    files = plan.model_files()
    assert {*KEPT, "generation_config.json", "config.yaml"} == set(files)
    assert "attention_bias: true" in files["config.yaml"].decode()
    # What is stated beside may agree, or be the run's own.
    plan = prepare(path, ["model.hidden_size=64", "model.hidden_dropout=0.1"], 1)
    assert plan.config.model.hidden_dropout == 0.1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.hidden_size=32"],
            "command line: model.hidden_size=32 is not that of init_from={folder}, 64; delete it to train those "
            "weights on, or delete init_from to train from scratch",
        ),
        (
            ["model.rope_scaling={rope_type: linear, factor: 2}", "model.architecture=gpt2"],
            "command line: model.rope_scaling={{...}} is not that of init_from={folder}, null; delete it to train "
            "those weights on, or write the whole section model to train them on so, or delete init_from to train from "
            "scratch\ncommand line: model.architecture='gpt2' is not that of init_from={folder}, 'llama'; delete it",
        ),
        (["model.hiden_size=32"], "command line: model.hiden_size is not a key; did you mean 'model.hidden_size'?"),
        (["init_from=/absent"], "init_from=/absent: there is no such folder; give a checkpoint step_N"),
        (["model=7"], "command line: model=7 is not a section"),
    ],
)
def test_what_disagrees_with_the_weights_is_told_with_both(
    chat_model: Path, conversations: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    folder = tmp_path / "m"
    folder.symlink_to(chat_model)
    path = write_run(tmp_path, conversations, init_from=str(folder))
    with pytest.raises(UserError) as raised:
        prepare(path, overrides, 1)
    assert str(raised.value).startswith(message.format(folder=folder))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("generation_config.json", "{broken", "cannot be read as JSON: "),
        ("generation_config.json", "[1]", "is not a JSON object; "),
        ("generation_config.json", '{"eos_token_id": [2, 99999]}', "eos_token_id has 99999, and the model has "),
        ("generation_config.json", '{"eos_token_id": -1}', "eos_token_id has -1, and the model has "),
        ("tokenizer_config.json", "{", "cannot be read as JSON: "),
        ("special_tokens_map.json", "[]", "is not a JSON object; "),
        ("chat_template.jinja", "\udcff", "cannot be read: "),
    ],
)
def test_a_file_of_no_use_to_the_trained_model_is_refused_before_training(
    chat_model: Path, conversations: Path, tmp_path: Path, file: str, content: str, message: str
) -> None:
    """Whether it goes with the weights to begin with or with the tokenizer, on a first start and on a later one."""
    source = shutil.copytree(chat_model, tmp_path / "source")
    of_weights = write_run(tmp_path, conversations, init_from=str(source))
    of_tokenizer, sizes = tmp_path / "tokenizer.yaml", dict(open_weights(source).model)
    document = yaml.safe_load(of_weights.read_text()) | {"model": sizes}
    document["data"]["tokenizer"] = str(source)
    del document["init_from"]
    of_tokenizer.write_text(yaml.safe_dump(document))
    for path in (of_weights, of_tokenizer):
        check_start(prepare(path, [], 1))
    (source / file).write_text(content, errors="surrogateescape")

    def refused(path: Path) -> str:
        with pytest.raises(UserError) as raised:
            check_start(prepare(path, [], 1))
        return str(raised.value)

    for path in (of_weights, of_tokenizer):
        assert refused(path).startswith(f"{source}/{file}: {message}")
    shutil.copy(chat_model / file, source)
    saved(of_tokenizer)
    (source / file).write_text(content, errors="surrogateescape")
    assert refused(of_tokenizer).startswith(f"{source}/{file}: {message}")


def test_a_file_that_goes_into_no_checkpoint_may_be_as_it_is(
    chat_model: Path, conversations: Path, tmp_path: Path
) -> None:
    """Beside a tokenizer of a name of its own, the files may be those of another."""
    source = shutil.copytree(chat_model, tmp_path / "source")
    (source / "tokenizer.json").rename(source / "mine.json")
    (source / "tokenizer_config.json").write_text("{broken")
    path = write_run(tmp_path, conversations, model=dict(open_weights(chat_model).model))
    plan = prepare(path, [f"data.tokenizer={source}/mine.json"], 1)
    assert check_start(plan) == "start: anew"
    assert "tokenizer_config.json" not in plan.model_files()


def test_weights_to_begin_with_are_passed_over_aloud_where_the_run_goes_on(
    chat_model: Path, conversations: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(chat_model, tmp_path / "source")
    path = write_run(tmp_path, conversations, init_from=str(source))
    saved(path)
    line = check_start(prepare(path, [], 1))
    assert line.startswith(f"start: from {tmp_path}/run/checkpoints/step_1, step 1, if it is whole; ")
    assert f"init_from={source} is ignored, " in line
    assert "resume=never" in line
    whole = tmp_path / "run/checkpoints/step_1/config.yaml"  # with its section model
    plan = prepare(whole, [f"init_from={tmp_path}/gone"], 1)
    with pytest.raises(UserError, match="init_from=.*gone: there is no such folder"):
        check_start(plan)


def documents_with(folder: Path, tokenizer: Path, *options: str) -> Path:
    (folder / "text.jsonl").write_text('{"text": "How are you?"}\n' * 60)
    words = [str(folder / "text.jsonl"), "--output", str(folder / "text"), "--tokenizer", str(tokenizer)]
    assert main(["preprocess", *words, "--workers", "1", "--force", *options]) == 0
    return folder / "text"


MODEL = {
    "architecture": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def test_the_end_of_documents_that_a_run_was_trained_on_ends_a_text_everywhere(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer's file alone, from which nobody could tell the token that was put behind every document."""
    tokenizer = tmp_path / "tokenizer.json"
    content = json.loads((chat_model / "tokenizer.json").read_text())
    prefix = '{"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, '
    prefix += '{"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}, '
    prefix += '{"Sequence": {"id": "B", "type_id": 0}}], "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", '
    prefix += '"ids": [1], "tokens": ["<|im_start|>"]}}}'
    content["post_processor"] = json.loads(prefix)
    tokenizer.write_text(json.dumps(content))
    data = documents_with(tmp_path, tokenizer, "--append-eod", "--eod-token", "<|im_end|>")
    path = write_run(tmp_path, data, model=MODEL)
    reader = CheckpointReader(saved(path, [f"data.tokenizer={tokenizer}"]))
    documents = reader.manifest.documents
    assert documents is not None
    assert (documents.ends, documents.beginning) == ((2,), ())
    vocabulary = open_vocabulary(open_weights(tmp_path / "run"), None)
    assert vocabulary.ends == {0, 2}
    # No document began with the token that the tokenizer would put before a text, so no prompt does.
    named = open_vocabulary(open_weights(tmp_path / "run"), tokenizer)
    assert named.encode("How", "here") == vocabulary.encode("How", "here")
    assert vocabulary.encode("How", "here")[0] != 1
    assert vocabulary.encode("", "here") == [2]
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert "note: the tokenizer puts <|im_start|> before every text, and no training document had it" in (
        capsys.readouterr().out
    )
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [0, 2]
    # Weights keep what they know: of a checkpoint of weights alone, and of a run that begins with them.
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "held"), "--to", "megalite"]) == 0
    assert CheckpointReader(tmp_path / "held").manifest.documents == documents
    data = documents_with(tmp_path, tokenizer)
    path = write_run(
        tmp_path,
        data,
        init_from=str(tmp_path / "held"),
        data={"sequence_length": 8, "train": [{"prefix": str(data)}], "tokenizer": str(tokenizer)},
    )
    assert prepare(path, [], 1).documents == documents
    # A checkpoint from before is read, and generates as it did.
    manifest = tmp_path / "held/manifest.json"
    told = json.loads(manifest.read_text())
    del told["documents"]
    manifest.write_text(json.dumps(told))
    before = open_vocabulary(open_weights(tmp_path / "held"), None)
    assert before.ends == {0}
    assert before.encode("How", "here")[0] == 1


def test_ends_of_generation_settings_are_completed_and_else_left_as_they_are(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The settings of the weights end at 0 alone; documents were trained to end at 2."""
    source = shutil.copytree(chat_model, tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.7, "do_sample": true}')
    data = documents_with(tmp_path, source, "--append-eod", "--eod-token", "<|im_end|>")
    path = write_run(tmp_path, data, init_from=str(source))
    saved(path)
    assert open_vocabulary(open_weights(tmp_path / "run"), None).ends == {0, 2}
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert written == {"eos_token_id": [0, 2], "temperature": 0.7, "do_sample": True}
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == [0, 2]
    capsys.readouterr()


def test_the_files_of_a_run_are_those_of_its_tokenizer_and_then_of_its_weights(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json", "README.md"):
        (tmp_path / name).write_text(f"data's {name}")
    json_file, model = tmp_path / "tokenizer.json", tmp_path / "tokenizer.model"
    everything = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"}
    assert set(tokenizer_model_files(json_file, "tokenizer.json")) == everything
    # The file that is looked for first must be the one that was named.
    assert set(tokenizer_model_files(model, "tokenizer.model")) == everything - {"tokenizer.json"}
    assert set(tokenizer_model_files(tmp_path / "README.md", "tokenizer.model")) == {"tokenizer.model"}

    own = tokenizer_model_files(json_file, "tokenizer.json")
    same: dict[str, bytes] = dict.fromkeys(
        ("tokenizer.model", "chat_template.jinja", "generation_config.json"), b"theirs"
    )
    same["tokenizer.json"] = b"data's tokenizer.json"
    found = run_model_files(own, same)
    assert set(found) == everything | {"chat_template.jinja"}
    assert [name for name, content in found.items() if content == b"theirs"] == [
        "chat_template.jinja",
        "generation_config.json",
    ]
    # Ids of another tokenizer's say something else; weights without a tokenizer say what they know.
    assert run_model_files(own, {**same, "tokenizer.json": b"another"}) == run_model_files(own, {})
    assert run_model_files(own, {"generation_config.json": b"theirs"})["generation_config.json"] == b"theirs"
    assert run_model_files(None, same) == same


ENDS: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
    ({"eos_token_id": 2}, None),
    ({"eos_token_id": [2, 5]}, None),
    ({"eos_token_id": None}, None),
    ({"eos_token_id": 2}, {"eos_token_id": 7}),
    ({"eos_token_id": 2}, {"eos_token_id": [7, 3]}),
    ({"eos_token_id": None}, {"eos_token_id": 7}),
    ({"eos_token_id": 2}, {"temperature": 0.5, "do_sample": True}),
]


@pytest.mark.parametrize(("config", "generation"), ENDS)
def test_what_ends_a_text_is_what_transformers_ends_at(
    chat_model: Path, tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None
) -> None:
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(chat_model, tmp_path / "m")
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, **config}))
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    theirs = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    ends = {theirs} if isinstance(theirs, int) else set(theirs or ())
    # Where transformers would go on for ever, the tokenizer's own end ends a text: <|im_end|>.
    assert open_vocabulary(open_weights(folder), None).ends == (ends or {2})
    assert main(["convert", str(folder), str(tmp_path / "held")]) == 0
    assert open_vocabulary(open_weights(tmp_path / "held"), None).ends == (ends or {2})
    assert main(["convert", str(tmp_path / "held"), str(tmp_path / "out")]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id
    assert ({again} if isinstance(again, int) else set(again)) == (ends or {2})


def test_the_tokenizers_files_name_the_end_that_nothing_else_tells() -> None:
    ids = {"<e>": 4, "</s>": 2}
    for settings, ends in (
        (({"eos_token": "<e>"}, {}), [4]),
        (({"eos_token": {"content": "<e>", "lstrip": False}}, {}), [4]),
        (({"eos_token": None}, {"eos_token": "<e>"}), [4]),
        (({}, {"eos_token": "<gone>"}), [2]),
        (({}, {}), [2]),
    ):
        assert end_token_ids([], settings, ids.get, 2, None) == ends
    assert end_token_ids([9], ({"eos_token": "<e>"},), ids.get, 2, None) == [9]
    assert end_token_ids([], (), ids.get, None, None) == []
    assert named_token("eos_token", {"eos_token": ""}, {"eos_token": ["x"]}) is None


@pytest.mark.parametrize("wrong", [-1, 304, "2", 2.0, True, [2, -7], [[2]]])
def test_an_end_that_is_no_token_of_the_model_is_refused(chat_model: Path, tmp_path: Path, wrong: Any) -> None:
    folder = shutil.copytree(chat_model, tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id has .*; write ids from 0 to 303"):
        open_vocabulary(open_weights(folder), None)
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "hf"]) == 2
