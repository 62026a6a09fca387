"""The small files of a run's checkpoints, and the tokens of its documents, from its tokenizer, data and weights."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from megalite.checkpoint.model_files import (
    GENERATION_CONFIG,
    read_settings,
    require_readable,
    run_model_files,
    tokenizer_model_files,
    tokenizer_name,
)
from megalite.checkpoint.special_tokens import DocumentTokens, declared_end_ids
from megalite.checkpoint.weights import CheckpointWeights, document_tokens
from megalite.config import RunConfig
from megalite.data.indexed.format import DatasetSidecar
from megalite.data.tokenizers.load import standard_files, tokenizer_file
from megalite.model.weights import Weights

CONFIG = "config.yaml"
"""The resolved run file in a checkpoint."""


def model_files(config: RunConfig, weights: Weights | None, sidecars: Sequence[DatasetSidecar]) -> dict[str, bytes]:
    """Return the small files of every checkpoint.

    They are the resolved run file, and byte for byte the files of the tokenizer and the generation settings, from
    `data.tokenizer` and the `weights` of `init_from`.
    """
    of_weights: dict[str, bytes] = {}
    if weights is not None:
        from megalite.convert.generation_config import model_file_contents  # with the readers of foreign formats

        of_weights = model_file_contents(weights, weights.model_files)
    tokenizer, standard = None, {}
    if config.data.tokenizer is not None:
        file = tokenizer_file(config.data.tokenizer)
        standard = standard_files(config.data.tokenizer)
        tokenizer = tokenizer_model_files(file, next(iter(standard)))
    elif (name := tokenizer_name(of_weights)) and (digests := {one.tokenizer_sha256 for one in sidecars}):
        # The tokenizer of the weights is that of the run, unless the data was made with another tokenizer.
        of_weights = of_weights if digests == {sha256(of_weights[name]).hexdigest()} else {}
    return run_model_files(tokenizer, of_weights) | standard | {CONFIG: config.to_yaml().encode()}


def tokens_of_documents(
    weights: Weights | None, sidecars: Sequence[DatasetSidecar], tokenizer_digest: str | None
) -> DocumentTokens:
    """Return the end and beginning tokens of documents, from the training data and the `weights` of `init_from`.

    The weights may have been trained with further end tokens, and with a token before every text.
    """
    ends = [one.eod_id for one in sidecars if one.eod_id is not None]
    begins = [one for one in (getattr(sidecar, "bos_id", None) for sidecar in sidecars) if one is not None]
    before = document_tokens(weights) if weights else None
    if isinstance(weights, CheckpointWeights) and tokenizer_digest is not None:
        theirs = weights.reader.manifest.tokenizer_sha256
        before = before if theirs in (None, tokenizer_digest) else None  # its ids are other tokens here
    beginning: tuple[int, ...] | None = tuple(begins[:1])
    if not beginning and weights:
        beginning = before.beginning if before is not None else None
    elif not beginning and not sidecars:
        beginning = None
    return DocumentTokens(tuple(dict.fromkeys([*ends, *(before.ends if before is not None else ())])), beginning)


def require_readable_model_files(config: RunConfig, weights: Weights | None) -> None:
    """Raise UserError where a file of `data.tokenizer` or of the weights is of no use to `generate` and `convert`."""
    of_weights, vocab_size = {}, config.model.vocab_size
    assert vocab_size is not None
    if weights is not None:
        from megalite.convert.generation_config import generation_settings  # with the readers of foreign formats

        of_weights = weights.model_files
        settings, where = generation_settings(weights, of_weights)
        declared_end_ids(settings, vocab_size, where)
    beside = _files_beside_the_tokenizer(config.data.tokenizer)
    if GENERATION_CONFIG not in of_weights and (path := beside.get(GENERATION_CONFIG)) is not None:
        declared_end_ids(read_settings(path), vocab_size, str(path))
    for name, path in {**of_weights, **beside}.items():
        if name != GENERATION_CONFIG:  # which was read
            require_readable(name, path)


def _files_beside_the_tokenizer(tokenizer: Path | None) -> dict[str, Path]:
    """Return the files that belong to a tokenizer, without its own file, which was opened; none where it is missing."""
    if tokenizer is None or not tokenizer.exists():
        return {}
    name = next(iter(standard_files(tokenizer)))
    found = tokenizer_model_files(tokenizer_file(tokenizer), name)
    return {other: path for other, path in found.items() if other != name}
