"""A model's tokenizer, with what goes before a text and what ends one."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megalite.checkpoint.model_files import (
    GENERATION_CONFIG,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    model_files_among,
    read_settings,
    tokenizer_name,
)
from megalite.checkpoint.special_tokens import declared_end_ids, end_token_ids, named_token
from megalite.checkpoint.weights import document_tokens
from megalite.convert.generation_config import generation_settings
from megalite.data.tokenizers.base import Tokenizer
from megalite.data.tokenizers.load import load_tokenizer, tokenizer_file
from megalite.errors import UserError
from megalite.model.weights import Weights


class Vocabulary:
    """A tokenizer; `leading` are the ids that every text begins with, `ends` those that end one.

    `begins_document` are the ids behind which the model has seen documents begin, where that is known.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        leading: Sequence[int],
        ends: Sequence[int],
        model_size: int,
        begins_document: Sequence[int] = (),
    ) -> None:
        self._tokenizer, self.leading, self._begins_document = tokenizer, list(leading), list(begins_document)
        # A model's vocabulary is often padded: what no tokenizer knows has no text.
        self._known = min(tokenizer.vocab_size, model_size)
        self._model_size = model_size
        self.ends = frozenset(ends)

    def encode(self, text: str, where: str) -> list[int]:
        """Return the token ids of a prompt; an empty one begins a document.

        Raises UserError, which begins with `where`, for ids beyond the model's, and where nothing begins a document.
        """
        ids = self.leading + self._tokenizer.encode(text)
        if not ids:
            ids = list(self._begins_document)
        if not ids and self._tokenizer.eod_id is not None:
            ids = [self._tokenizer.eod_id]
        if not ids:
            raise UserError(f"{where}: is empty, and the vocabulary has no token that begins a document; give text")
        if max(ids) >= self._model_size:
            raise UserError(
                f"{where}: has token id {max(ids)}, and the model has vocab_size={self._model_size}; "
                "give the tokenizer that the model was trained with: --tokenizer"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; control tokens, and ids that the tokenizer has not, have none."""
        return self._tokenizer.decode([token for token in ids if token < self._known])

    def control_token(self, name: str) -> int | None:
        """Return the id of a control token, which no text shows; None where there is none of that name."""
        return self._tokenizer.control_tokens.get(name)


def open_vocabulary(weights: Weights, tokenizer: Path | None) -> Vocabulary:
    """Return a model's vocabulary from the files that go with the weights, or its tokenizer from `tokenizer` if given.

    Raises UserError where there is no tokenizer, or where a file names a token that is none of the model's.
    """
    file = _file(weights) if tokenizer is None else tokenizer_file(tokenizer)
    loaded = load_tokenizer(file)
    of_weights, size = weights.model_files, weights.model.vocab_size
    assert size is not None  # weights have a table of tokens
    beside = of_weights if tokenizer is None else _beside(file)
    # How generation ends belongs to the weights, whatever tokenizer is given; only where they tell nothing is it asked.
    generation = of_weights if GENERATION_CONFIG in of_weights else {**beside, **of_weights}
    settings, where = generation_settings(weights, generation)
    documents = document_tokens(weights)
    told = tuple(read_settings(beside.get(name)) for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP))
    ends = end_token_ids(declared_end_ids(settings, size, where), told, loaded.token_id, loaded.eod_id, documents)
    leading: Sequence[int] | None = documents.beginning if documents is not None else None
    if leading is None:
        leading = _leading(file, beside, loaded)
    begins_document = documents.ends[:1] if documents is not None else ()
    return Vocabulary(loaded, leading, ends, size, begins_document)


def untrained_beginning(weights: Weights, model_files: Mapping[str, Path]) -> list[str]:
    """Return the tokens that a tokenizer puts before every text, and that stood before no training document.

    They are told by their names, as far as the tokenizer has some; none where it is not known how documents began.
    """
    documents, name = document_tokens(weights), tokenizer_name(model_files)
    if documents is None or documents.beginning is None or name is None:
        return []
    loaded = load_tokenizer(model_files[name])
    names = {token: name for name, token in loaded.control_tokens.items()}
    put = _leading(model_files[name], model_files, loaded)
    return [names.get(token, str(token)) for token in put if token not in documents.beginning]


def _beside(file: Path) -> Mapping[str, Path]:
    return model_files_among(file.parent, sorted(path.name for path in file.parent.iterdir() if path.is_file()))


def _file(weights: Weights) -> Path:
    beside = weights.model_files
    name = tokenizer_name(beside)
    if name is not None:
        return beside[name]
    raise UserError(
        f"{weights.origin}: has no tokenizer with it (tokenizer.json, tokenizer.model or an encoding's .tiktoken); "
        "name the one that the model was trained with: --tokenizer PATH"
    )


def _leading(file: Path, beside: Mapping[str, Path], tokenizer: Tokenizer) -> list[int]:
    """Return the ids put before every text: what tokenizer_config.json says, else what tokenizer.json does."""
    config = beside.get(TOKENIZER_CONFIG)
    told = read_settings(config)
    if isinstance(told.get("add_bos_token"), bool):
        name = named_token("bos_token", told, read_settings(beside.get(SPECIAL_TOKENS_MAP)))
        token = tokenizer.token_id(name) if told["add_bos_token"] and name is not None else None
        if told["add_bos_token"] and token is None:
            raise UserError(f"{config}: add_bos_token asks for bos_token={name!r}, which {file} has not; mend either")
        return [] if token is None else [token]
    return _put_before(file) if file.suffix == ".json" else []


def _put_before(file: Path) -> list[int]:
    """Return what the post-processor of a tokenizer.json puts before a text."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    bare, dressed = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    start = next((at for at in range(len(dressed)) if dressed[at : at + len(bare)] == bare), 0)
    return dressed[:start]
