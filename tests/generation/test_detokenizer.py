"""Text out of tokens as they come: whole characters, the same text in the end, and stops wherever tokens end."""

from pathlib import Path

import pytest

from megalite.data.tokenizers.base import Tokenizer
from megalite.data.tokenizers.load import load_tokenizer
from megalite.generation.detokenizer import StopTexts, TextStream

TEXT = "the fox said “naïve café”,  中文字 and 🦊🦊 ran\n\n away\n"


@pytest.fixture(scope="module", params=["sentencepiece", "bytes of a Hugging Face tokenizer"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_bytes: bytes):
    folder: Path = tmp_path_factory.mktemp("tokenizers")
    if request.param == "sentencepiece":
        (folder / "tokenizer.model").write_bytes(tokenizer_bytes)
        return load_tokenizer(folder)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    made.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def pieces_of(tokenizer: Tokenizer, before: list[int], after: list[int]) -> list[str]:
    stream = TextStream(tokenizer.decode, before)
    return [*(stream.feed(token) for token in after), stream.finish()]


@pytest.mark.parametrize("prompt_tokens", [0, 1, 5, 17])
def test_pieces_are_whole_characters_and_make_up_the_text(tokenizer: Tokenizer, prompt_tokens: int) -> None:
    ids = tokenizer.encode(TEXT)
    before = tokenizer.decode(ids[:prompt_tokens])
    assert "\ufffd" not in before
    pieces = pieces_of(tokenizer, ids[:prompt_tokens], ids[prompt_tokens:])
    assert before + "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    fox = len(tokenizer.encode("🦊")) - (1 if tokenizer.control_tokens else 0)  # less the space in front
    assert fox == 4
    assert "🦊" in pieces
    assert pieces.count("") >= 2 * 3  # three of four bytes make no text


def test_text_comes_at_once(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the fox ran")
    assert len([piece for piece in pieces_of(tokenizer, [], ids)[:-1] if piece]) == len(ids)


def test_half_a_character_shows_only_at_the_end(tokenizer: Tokenizer) -> None:
    pieces = pieces_of(tokenizer, [], tokenizer.encode("a 中")[:-1])
    assert pieces[-1].strip("\ufffd") == ""
    assert pieces[-1]
    assert "\ufffd" not in "".join(pieces[:-1])


@pytest.mark.parametrize(
    ("stops", "pieces", "text", "held"),
    [
        (["END"], ["a", "bEN", "Dc"], ["a", "b", ""], ""),
        (["END"], ["E", "N", "E", "N", "D"], ["", "", "EN", "", ""], ""),
        (["END"], ["E", "N", "x"], ["", "", "ENx"], ""),
        (["END"], ["x", "EN"], ["x", ""], "EN"),
        (["b", "ab"], ["xa", "b"], ["x", ""], ""),
        (["\n\n"], ["a\n", "\nb"], ["a", ""], ""),
        ([], ["a", "b"], ["a", "b"], ""),
    ],
)
def test_a_stop_text_is_found_wherever_pieces_end(
    stops: list[str], pieces: list[str], text: list[str], held: str
) -> None:
    watch = StopTexts(stops)
    shown = []
    for piece in pieces:
        assert not watch.found
        shown.append(watch.feed(piece))
    assert shown == text
    assert watch.found == any(stop in "".join(pieces) for stop in stops)
    assert watch.finish() == held
