"""What is checked before any rank starts: the model, its vocabulary, the prompts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from generating import LLAMA, save_model

from megalite.convert.open import open_weights
from megalite.errors import UserError
from megalite.generation.prompts import Prompt, read_prompts
from megalite.generation.request import Job, Limits, Sampling, prepare
from megalite.generation.tokenization import open_vocabulary


def job_of(path: Path, *texts: str, **options: Any) -> Job:
    return prepare(path, read_prompts(texts, None), sampling=Sampling(), limits=Limits(), **options)


def test_a_runs_folder_and_a_checkpoint_are_the_same_model(llama_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_checkpoint, tmp_path / "run/checkpoints/step_0")
    for path in (llama_checkpoint, tmp_path / "run", tmp_path / "run/checkpoints"):
        job = job_of(path, "the fox")
        assert job.vocabulary.decode(job.prompt_ids[0]) == "the fox"
        assert job.precision == "fp32"


def test_an_empty_prompt_begins_a_document(llama_checkpoint: Path) -> None:
    job = job_of(llama_checkpoint, "", "the")
    assert job.prompt_ids[0] == [2]  # <|endoftext|>
    assert job.prompt_ids[1][0] != 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor": 3}, "--tensor=3 does not divide model.num_attention_heads=4; use 1, 2 or 4"),
        ({"precision": "fp8"}, "--dtype=fp8: is none that is computed in; use fp32, bf16, fp16"),
        ({"tokenizer": Path("absent.model")}, "absent.model: no such tokenizer"),
    ],
)
def test_what_the_model_cannot_do_is_refused(llama_checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        job_of(llama_checkpoint, "the", **options)
    assert str(raised.value).startswith(message)


def test_a_prompt_without_room_for_a_token_is_refused(llama_checkpoint: Path) -> None:
    fits = job_of(llama_checkpoint, "0" * 38)  # a token for each digit, and one for the space in front
    assert len(fits.prompt_ids[0]) == 39
    with pytest.raises(UserError) as raised:
        job_of(llama_checkpoint, "the", "0" * 39)
    assert str(raised.value) == (
        "--prompt 2: has 40 tokens, and the model has max_position_embeddings=40; use at most 39 tokens"
    )


def test_weights_without_a_tokenizer_need_one_named(tmp_path: Path, tokenizer_bytes: bytes) -> None:
    save_model(tmp_path / "step_0", LLAMA)
    with pytest.raises(UserError, match="has no tokenizer with it.*--tokenizer PATH"):
        job_of(tmp_path / "step_0", "the")
    (tmp_path / "tok.model").write_bytes(tokenizer_bytes)
    assert job_of(tmp_path / "step_0", "the", tokenizer=tmp_path / "tok.model").prompt_ids[0]


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, tokenizer_bytes: bytes) -> None:
    save_model(tmp_path / "step_0", {**LLAMA, "vocab_size": 264}, tokenizer_bytes)
    with pytest.raises(UserError, match=r"--prompt: has token id \d+, and the model has vocab_size=264"):
        job_of(tmp_path / "step_0", "the quick brown fox")


def test_ids_that_the_tokenizer_has_not_have_no_text(llama_checkpoint: Path) -> None:
    vocabulary = open_vocabulary(open_weights(llama_checkpoint), None)
    ids = vocabulary.encode("the fox", "here")
    assert vocabulary.decode([*ids, 310, 332]) == "the fox"


def tokenizer_folder(folder: Path, *, added: str, config: dict[str, Any] | None) -> Path:
    """A folder with a tokenizer.json whose post-processor puts `added` around a text, and a config beside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["<s>", "<unk>", "the", "fox", "a"]
    made = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    made.add_special_tokens(["<s>"])
    made.post_processor = processors.TemplateProcessing(added, None, [("<s>", 0)])  # pyright: ignore
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("added", "config", "leading"),
    [
        ("<s> $A", None, [0]),
        ("<s> $A <s>", {"bos_token": "<s>"}, [0]),
        ("$A", None, []),
        ("$A", {"add_bos_token": True, "bos_token": "<s>"}, [0]),
        ("$A", {"add_bos_token": True, "bos_token": {"content": "<s>"}}, [0]),
        ("<s> $A", {"add_bos_token": False, "bos_token": "<s>"}, []),
    ],
)
def test_what_a_tokenizer_puts_before_a_text_goes_before_a_prompt(
    llama_checkpoint: Path, tmp_path: Path, added: str, config: dict[str, Any] | None, leading: list[int]
) -> None:
    folder = tokenizer_folder(tmp_path / "tok", added=added, config=config)
    vocabulary = open_vocabulary(open_weights(llama_checkpoint), folder)
    assert vocabulary.encode("the fox", "here") == [*leading, 2, 3]
    if leading:
        assert vocabulary.encode("", "here") == leading
    else:
        with pytest.raises(UserError, match="here: is empty"):
            vocabulary.encode("", "here")


def test_a_beginning_that_the_vocabulary_lacks_is_refused(llama_checkpoint: Path, tmp_path: Path) -> None:
    config = {"add_bos_token": True, "bos_token": "<begin>"}
    folder = tokenizer_folder(tmp_path / "tok", added="$A", config=config)
    with pytest.raises(UserError, match="add_bos_token asks for bos_token='<begin>'"):
        open_vocabulary(open_weights(llama_checkpoint), folder)


def test_prompts_stand_in_lines_of_text_or_json(tmp_path: Path) -> None:
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_bytes(" the fox \r\n\nünd\n".encode())
    lines.write_text('{"prompt": "a\\nb", "id": 3}\n\n{"prompt": ""}\n')
    assert read_prompts(["first"], text) == [
        Prompt("--prompt", "first"),
        Prompt(f"{text}: line 1", " the fox "),
        Prompt(f"{text}: line 3", "ünd"),
    ]
    assert [prompt.text for prompt in read_prompts([], lines)] == ["a\nb", ""]
    for file in (text, lines):
        before = read_prompts([], file)
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        assert read_prompts([], file) == before, "a byte order mark is no text"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n\n", "p.txt: nothing to continue"),
        ("p.txt", b"a\xff", "p.txt: byte 1 is no UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', 'p.jsonl: line 2: has no text "prompt"'),
        ("p.jsonl", b'"a"\n', 'p.jsonl: line 1: has no text "prompt"'),
        ("p.jsonl", b"{\n", "p.jsonl: line 1: is no JSON"),
        ("p.jsonl", b'{"prompt": "a\\ud800"}\n', "p.jsonl: line 1: character 1 is no Unicode character"),
    ],
)
def test_a_malformed_file_of_prompts_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_prompts([], tmp_path / name)
    assert str(raised.value).startswith(f"{tmp_path}/{message}")


def test_no_prompt_and_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--prompt: nothing to continue"):
        read_prompts([], None)
    with pytest.raises(UserError, match="absent.txt: cannot be read: No such file"):
        read_prompts([], tmp_path / "absent.txt")
