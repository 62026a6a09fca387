"""Paths that are the names of models on a hub: nothing is loaded from a network, and the download is named instead."""

import re
from pathlib import Path

_NAMED = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_ALONE = re.compile(r"(distil)?gpt2(-medium|-large|-xl)?", re.ASCII)
"""Names without an owner, which nanoGPT and older scripts of Hugging Face take."""
_SITE = re.compile(r"https?:/+(www\.)?huggingface\.co/")
_FILES = (".model", ".json", ".txt", ".tiktoken", ".yaml", ".yml", ".safetensors", ".bin", ".pt")


def hub_hint(path: Path) -> str:
    """Return how to download what a path names on Hugging Face's hub; "" where it is no such name.

    ``owner/model`` is one where neither it nor a folder ``owner`` is on this machine.
    """
    name = _SITE.sub("", path.as_posix())
    from_site = name != path.as_posix()
    name = "/".join(name.split("/")[:2]) if from_site else name
    alone = _ALONE.fullmatch(name) is not None
    named = _NAMED.fullmatch(name) is not None and not name.endswith(_FILES)
    if path.exists() or not (alone or (named and (from_site or not Path(name).parent.exists()))):
        return ""
    folder = f"models/{Path(name).name}"
    return (
        f"megalite loads nothing from a network: download it with `hf download {name} --local-dir {folder}` "
        f"(`huggingface-cli download` in older versions), and write {folder}"
    )
