"""Text in UTF-16 and UTF-32 is told from UTF-8 wherever text is read, and the command that converts it is offered."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megalite.config.text_file import read_text
from megalite.convert.open import open_weights
from megalite.data.chat.chat_template import load_chat_template
from megalite.data.preprocess.readers import documents
from megalite.data.tokenizers.load import load_tokenizer
from megalite.errors import UserError
from megalite.generation.prompts import read_prompts
from megalite.text_encoding import read_utf8

MARKED = ("utf-16", "utf-32")
UNMARKED = ("utf-16-le", "utf-16-be")


def _documents(path: Path) -> object:
    return list(documents([path], ["text"]))


READERS: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "a run file": ("run.yaml", "run: {dir: x}", read_text),
    "prompts": ("p.txt", "the fox", lambda path: read_prompts([], path)),
    "prompts in JSON": ("p.jsonl", '{"prompt": "the fox"}', lambda path: read_prompts([], path)),
    "a chat template": ("chat.yaml", "roles: {assistant: {prefix: x}}", load_chat_template),
    "lines": ("a.jsonl", '{"text": "the fox"}\n' * 3, _documents),
    "an array": ("a.json", '[{"text": "the fox"}]', _documents),
    "a text": ("a.txt", "the fox", _documents),
    "a packed text": ("a.txt.gz", "the fox", _documents),
    "a tokenizer": ("tokenizer.json", json.dumps({"version": "1.0", "model": {"type": "BPE"}}), load_tokenizer),
    "a model": ("config.json", json.dumps({"model_type": "llama"}), lambda path: open_weights(path.parent)),
}


@pytest.mark.parametrize("encoding", [*MARKED, *UNMARKED])
@pytest.mark.parametrize("name", READERS)
def test_every_reader_names_the_encoding_and_offers_iconv(name: str, encoding: str, tmp_path: Path) -> None:
    file, text, read = READERS[name]
    data = text.encode(encoding)
    path = tmp_path / file
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    with pytest.raises(UserError) as raised:
        read(path)
    told = encoding.replace("-le", "le").replace("-be", "be")
    assert str(raised.value).startswith(f"{path}: is in {told.upper()}")
    assert f"iconv -f {told} -t utf-8" in str(raised.value)


@pytest.mark.parametrize("text", ["", "a", "\0", "a\0b, c", "\0" * 64, "naïve 漢字 \0 text", "漢字\r\nthe fox\r"])
def test_utf8_is_read_whatever_it_holds(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + text.encode())
        assert read_utf8(path) == text.replace("\r\n", "\n").replace("\r", "\n")


def test_a_mark_before_a_models_config_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"model_type": "lama"}')
    with pytest.raises(UserError, match="did you mean 'llama'"):
        open_weights(tmp_path)
