"""A tokenizer that goes into a Hugging Face folder gives the ids there that the model was trained with."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megalite.convert.huggingface import sentencepiece_export as conversion
from megalite.convert.huggingface.tokenizer_files import tokenizer_files
from megalite.data.tokenizers.inner_text import InnerText
from megalite.data.tokenizers.load import load_tokenizer
from megalite.data.tokenizers.train_sentencepiece import train_sentencepiece
from megalite.errors import UserError

pytestmark = pytest.mark.slow

# Names of control tokens are read in text there, and here they are not.
DOCUMENTS = [path.read_text().replace("<", "< ") for path in sorted(Path(__file__).parent.glob("test_*.py"))]
IDENTITY: dict[str, Any] = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS: dict[str, dict[str, Any]] = {
    "as megalite trains": IDENTITY | {"split_digits": True, "allow_whitespace_only_pieces": True},
    "no prefix": IDENTITY | {"add_dummy_prefix": False},
    "spaces collapse": IDENTITY | {"remove_extra_whitespaces": True},
    "spaces collapse, no prefix": IDENTITY | {"remove_extra_whitespaces": True, "add_dummy_prefix": False},
    "normalised": {},
    "no bytes": IDENTITY | {"byte_fallback": False},
    "symbols of the user's": IDENTITY | {"user_defined_symbols": ["<x>", "def"]},
}
TEXTS = [
    *DOCUMENTS,
    *("", " ", "  ", "a", " a", "  a", "a ", "a  b", "\n", "\n a", "\u2581", "\u2581a", " \u2581a"),
    "snowman \u2603, \U0001f600 and \u65e5\u672c\u8a9e; tab\tand return\r\n\r",
]


def train(**options: Any) -> bytes:
    model = io.BytesIO()
    usual: dict[str, Any] = {
        "vocab_size": 900,
        "model_type": "bpe",
        "byte_fallback": True,
        "eos_piece": "<|endoftext|>",
        "control_symbols": ["<|im_start|>"],
        "max_sentence_length": 1 << 20,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS), model_writer=model, **{**usual, **options}
    )
    return model.getvalue()


def export(folder: Path, model: bytes) -> Path:
    """Write a folder as an exporter does."""
    (folder / "source").mkdir(parents=True)
    (folder / "source" / "tokenizer.model").write_bytes(model)
    found = tokenizer_files({"tokenizer.model": folder / "source" / "tokenizer.model"}, 900)
    (folder / "out").mkdir()
    for name, content in found.files.items():
        (folder / "out" / name).write_bytes(content)
    (folder / "out" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder / "out"


@pytest.mark.parametrize("kind", KINDS)
def test_a_bpe_model_has_the_same_ids_as_tokenizer_json(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = train(**KINDS[kind])
    folder = export(tmp_path, model)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = sentencepiece.SentencePieceProcessor(model_proto=model)  # pyright: ignore[reportCallIssue]
    for text in TEXTS:
        ids = ours.encode(text)  # pyright: ignore[reportAttributeAccessIssue]
        assert theirs.encode(text, add_special_tokens=False) == ids
        if kind in ("as megalite trains", "no prefix"):
            assert theirs.decode(ids) == ours.decode(ids)  # pyright: ignore[reportAttributeAccessIssue]
    assert (theirs.bos_token_id, theirs.eos_token, theirs.eos_token_id) == (1, "<|endoftext|>", 2)
    assert (folder / "tokenizer.model").read_bytes() == model
    assert load_tokenizer(folder).vocab_size == 900


def test_what_the_tokenizer_verb_trains_goes_along_with_its_control_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    path = tmp_path / "tokenizer.model"
    train_sentencepiece([tmp_path / "text.txt"], vocab_size=800, output=path, control_tokens=["<|im_end|>"])
    found = tokenizer_files({"tokenizer.model": path}, 800)
    assert found.token_ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    (tmp_path / "out").mkdir()
    for name, content in found.files.items():
        (tmp_path / "out" / name).write_bytes(content)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(path)
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    # A control token in the midst of a text: no prefix after it, as within a chat.
    for after in ("\nhello", " hello", "hello"):
        inner = [*ours.encode("user"), ours.control_tokens["<|im_end|>"], *InnerText(ours).encode(after)]
        assert theirs.encode(f"user<|im_end|>{after}", add_special_tokens=False) == inner


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram", "vocab_size": 700}, "of the kind unigram, .* give the model's own tokenizer.json"),
        ({"model_type": "char"}, "of the kind character"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        (IDENTITY | {"user_defined_symbols": ["   "]}, "its tokens are not those of the tokenizer.json made from it"),
    ],
)
def test_what_has_no_equal_is_refused_with_the_reason(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        export(tmp_path, train(**options, hard_vocab_limit=False))


def test_a_conversion_that_went_wrong_is_found_by_the_probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = conversion._merges
    monkeypatch.setattr(conversion, "_merges", lambda proto: right(proto)[::-1])
    with pytest.raises(UserError, match="its tokens are not those"):
        export(tmp_path, train(**IDENTITY))


def test_files_that_are_there_are_taken_as_they_are(tmp_path: Path) -> None:
    made = export(tmp_path, train(**IDENTITY))
    (made / "chat_template.jinja").write_text("{{ messages }}")
    (made / "generation_config.json").write_text('{"eos_token_id": [2, 7], "temperature": 0.5}')
    model_files = {path.name: path for path in made.iterdir() if path.name != "config.json"}
    found = tokenizer_files(model_files, 900)
    assert found.files == {name: path.read_bytes() for name, path in model_files.items()}
    assert found.token_ids == {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": None}
    del model_files["tokenizer_config.json"]
    config = json.loads(tokenizer_files(model_files, 900).files["tokenizer_config.json"])
    assert config["eos_token"] == "<|endoftext|>"


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    made = export(tmp_path, train(**IDENTITY))
    for name in ("tokenizer.json", "tokenizer.model"):
        with pytest.raises(UserError, match=f"{name}: has 900 token ids, the model 899"):
            tokenizer_files({name: made / name}, 899)
    (made / "cl100k_base.tiktoken").write_text("")
    with pytest.raises(UserError, match="reads no tiktoken ranks"):
        tokenizer_files({"cl100k_base.tiktoken": made / "cl100k_base.tiktoken"}, 900)


def test_no_tokenizer_is_no_file() -> None:
    assert tokenizer_files({}, 10).files == {}
