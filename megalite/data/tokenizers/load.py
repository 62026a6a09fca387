"""Find and load a tokenizer: sentencepiece, a Hugging Face tokenizer.json, GPT-2's two files, tiktoken."""

from pathlib import Path

from megalite.config.hub_names import hub_hint
from megalite.data.tokenizers import gpt2_files, tiktoken_tokenizer
from megalite.data.tokenizers.added_tokens import (
    ADDED_TOKENS,
    added_tokens_beside,
    added_tokens_file,
    with_added_tokens,
)
from megalite.data.tokenizers.base import Tokenizer
from megalite.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megalite.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from megalite.data.tokenizers.tiktoken_tokenizer import TiktokenTokenizer
from megalite.errors import UserError
from megalite.text_encoding import require_utf8

_FORMS = {".json": "a Hugging Face tokenizer.json", tiktoken_tokenizer.SUFFIX: "a file of tiktoken's ranks"}


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a sentencepiece model, a Hugging Face ``tokenizer.json``, GPT-2's ``vocab.json`` with its ``merges.txt``,
    tiktoken's ranks, or a folder with one of them.

    Beside a ``tokenizer.model`` the tokens of ``added_tokens.json`` and ``tokenizer_config.json`` are read as well.

    Raises UserError where there is none or the file is broken.
    """
    file = tokenizer_file(path)
    try:
        if file.name in gpt2_files.NAMES:
            return HuggingFaceTokenizer(gpt2_files.as_tokenizer_json(file))
        data = file.read_bytes()
        if file.suffix == ".json":
            require_utf8(file, data)
            return HuggingFaceTokenizer(data)
        if file.suffix == tiktoken_tokenizer.SUFFIX:
            return TiktokenTokenizer(data, file.stem)
        return with_added_tokens(SentencePieceTokenizer(data), file)
    except UserError:
        raise
    except Exception as error:  # the libraries raise bare Exception and RuntimeError
        form = _FORMS.get(file.suffix, "a sentencepiece model")
        if file.name in gpt2_files.NAMES:
            form = "GPT-2's vocabulary"
        reason = str(error).replace("\n", " ")
        raise UserError(
            f"{file}: not {form} ({reason}); allowed: tokenizer.json, a sentencepiece .model, vocab.json with "
            "merges.txt, a .tiktoken"
        ) from error


def standard_name(file: Path) -> str:
    """Return the name under which a folder's tokenizer is looked for, of a tokenizer's file of any name."""
    if file.suffix == tiktoken_tokenizer.SUFFIX:  # whose name says which encoding it is
        return file.name
    return "tokenizer.json" if file.suffix == ".json" else "tokenizer.model"


def tokenizer_file(path: Path) -> Path:
    """Return the file of a tokenizer that is named by its file or its folder; raise UserError where there is none."""
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return path / name
        if all((path / name).is_file() for name in gpt2_files.NAMES):
            return path / gpt2_files.NAMES[0]
        if ranks := sorted(path.glob(f"*{tiktoken_tokenizer.SUFFIX}")):
            return ranks[0]
        raise UserError(
            f"{path}: holds no tokenizer; a tokenizer.json, a tokenizer.model, a vocab.json with its merges.txt or an "
            "encoding's .tiktoken is looked for"
        )
    if not path.is_file():
        raise UserError(f"{path}: {_no_tokenizer(path)}")
    return path


def tokenizer_paths(path: Path) -> dict[str, Path]:
    """Return a tokenizer's files, by the names under which a folder's tokenizer is looked for; raise UserError where
    there is none."""
    file = tokenizer_file(path)
    if file.name in gpt2_files.NAMES:
        return {name: file.with_name(name) for name in gpt2_files.NAMES}
    added = file.with_name(ADDED_TOKENS)
    beside = {ADDED_TOKENS: added} if added_tokens_beside(file) and added.is_file() else {}
    return {standard_name(file): file} | beside


def standard_files(path: Path) -> dict[str, bytes]:
    """Return, by the names under which they are looked for, the files that make a tokenizer of this digest anywhere.

    GPT-2's two files come as one ``tokenizer.json``; a ``tokenizer.model`` comes with its added tokens. Raises
    UserError as `load_tokenizer` does.
    """
    file = tokenizer_file(path)
    if file.name in gpt2_files.NAMES:
        return {"tokenizer.json": gpt2_files.as_tokenizer_json(file)}
    name = standard_name(file)
    files = {name: file.read_bytes()}
    if name == "tokenizer.model" and (added := added_tokens_beside(file)):
        files[ADDED_TOKENS] = added_tokens_file(added)
    return files


def _no_tokenizer(path: Path) -> str:
    """Return what to say of a tokenizer that is not there."""
    forms = "a tokenizer.json, a sentencepiece .model, a vocab.json with its merges.txt, a .tiktoken"
    if path.suffix == ".model":
        return f"no such tokenizer; make one with `megalite tokenizer train INPUT --output {path}`, or give another"
    if path.suffix in (".json", ".txt", tiktoken_tokenizer.SUFFIX):
        return f"no such tokenizer; give another, which may be {forms}, or a folder with one of them"
    if hint := hub_hint(path):
        return f"no such tokenizer, neither a file nor a folder; {hint}"
    return (
        f"no such tokenizer, neither a file nor a folder; nothing is fetched by its name: give {forms}, or a folder "
        f"with one of them; or make one with `megalite tokenizer train INPUT --output {path.name or 'tok'}.model`"
    )
