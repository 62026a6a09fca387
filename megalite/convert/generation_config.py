"""How generation from weights ends, and the files that go with weights, in the form that transformers reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalite.checkpoint.model_files import GENERATION_CONFIG, read_settings
from megalite.checkpoint.special_tokens import TOKEN_IDS
from megalite.convert.huggingface.reader import HuggingFaceWeights
from megalite.model.weights import Weights


def generation_settings(weights: Weights, model_files: Mapping[str, Path]) -> tuple[dict[str, Any], str]:
    """Return what says how generation from weights ends, and the file it stands in, for messages.

    As in transformers that is ``generation_config.json`` among `model_files`, or ``config.json`` of a Hugging Face
    folder where there is no such file. Raises UserError where the file cannot be read.
    """
    path = model_files.get(GENERATION_CONFIG)
    if path is not None or not isinstance(weights, HuggingFaceWeights):
        return read_settings(path), str(path)
    told = {key: weights.config[key] for key in TOKEN_IDS if weights.config.get(key) is not None}
    return told, str(weights.origin / "config.json")


def model_file_contents(weights: Weights, model_files: Mapping[str, Path]) -> dict[str, bytes]:
    """Return the contents of the files that go with weights, `model_files`, as they are.

    What ``config.json`` of a Hugging Face folder says of special tokens becomes a ``generation_config.json`` where
    there is none, since that file does not go along.
    """
    contents = {name: path.read_bytes() for name, path in model_files.items()}
    if GENERATION_CONFIG not in contents and (told := generation_settings(weights, model_files)[0]):
        contents[GENERATION_CONFIG] = (json.dumps(told, indent=2) + "\n").encode()
    return contents
