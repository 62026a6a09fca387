"""Fill-in-the-middle: the parts are all there, in their order, and lengths and ends stay."""

import numpy as np
import pytest
from trained_tokenizers import KINDS, train_hugging_face, train_sentencepiece, train_tokenizer

from megalite.data.fill_in_the_middle import FIM_TOKENS, FillInTheMiddle, fim_tokens
from megalite.data.tokenizers.base import Tokenizer as TokenizerProtocol
from megalite.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megalite.errors import UserError

NAMES = FIM_TOKENS[0]


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, sentences: list[str]) -> TokenizerProtocol:
    texts = [*sentences, "naïve café 東京 🦊 jumps\n\tover  two spaces"]
    return train_tokenizer(request.param, texts, NAMES)


@pytest.fixture(scope="session")
def byte_level(sentences: list[str]) -> HuggingFaceTokenizer:
    return train_hugging_face(sentences, NAMES, metaspace=False)


def documents(tokenizer: TokenizerProtocol, sentences: list[str]) -> list[list[int]]:
    """Documents with an end each; some letters are outside the vocabularies."""
    assert tokenizer.eod_id is not None
    texts = ["".join(sentences[start : start + 4]) + f"東{start} ünïcode 🦊\n" for start in range(0, 120, 4)]
    return [[*tokenizer.encode_plain(text), tokenizer.eod_id] for text in texts]


def make(tokenizer: TokenizerProtocol, rate: float = 1.0, spm_rate: float = 0.5) -> FillInTheMiddle:
    return FillInTheMiddle(rate, spm_rate, *fim_tokens(tokenizer), tokenizer)


def parts_of(stretch: list[int], tokenizer: TokenizerProtocol) -> tuple[str, list[int], list[int], list[int]]:
    """(form, prefix, middle, suffix) of a rearranged stretch without its end of document."""
    prefix_id, middle_id, suffix_id = fim_tokens(tokenizer)
    assert stretch[0] == prefix_id
    assert [stretch.count(token) for token in (prefix_id, middle_id, suffix_id)] == [1, 1, 1]
    suffix_at, middle_at = stretch.index(suffix_id), stretch.index(middle_id)
    assert suffix_at < middle_at
    suffix, middle = stretch[suffix_at + 1 : middle_at], stretch[middle_at + 1 :]
    if suffix_at == 1:
        return "SPM", [], middle, suffix
    return "PSM", stretch[1:suffix_at], middle, suffix


def test_parts_joined_are_the_text_but_for_what_the_suffix_lost(
    tokenizer: TokenizerProtocol, sentences: list[str]
) -> None:
    fim = make(tokenizer)
    forms = []
    for number, document in enumerate(documents(tokenizer, sentences)):
        found = fim(np.array(document), [len(document)], number).tolist()
        if found == document:
            continue
        assert len(found) == len(document)
        assert found[-1] == tokenizer.eod_id
        form, prefix, middle, suffix = parts_of(found[:-1], tokenizer)
        forms.append(form)
        whole = tokenizer.decode(document)
        # The last character may have been cut within.
        begun = tokenizer.decode([*prefix, *middle, *suffix]).rstrip("\ufffd")
        assert whole.startswith(begun)
        assert len(whole) - len(begun) < 60
    assert len(forms) > 20
    assert {"PSM", "SPM"} == set(forms)


@pytest.mark.parametrize(("form", "spm_rate"), [("PSM", 0.0), ("SPM", 1.0)])
def test_rates_are_kept(form: str, spm_rate: float, sentences: list[str], byte_level: HuggingFaceTokenizer) -> None:
    document = documents(byte_level, sentences)[0]
    fim = make(byte_level, rate=0.25, spm_rate=spm_rate)
    found = [fim(np.array(document), [len(document)], key).tolist() for key in range(400)]
    forms = [parts_of(stretch[:-1], byte_level)[0] for stretch in found if stretch != document]
    assert 60 < len(forms) < 130
    # Without a prefix the two are one.
    assert forms.count(form) >= 0.9 * len(forms)


def test_cuts_fall_anywhere_between_characters(byte_level: HuggingFaceTokenizer) -> None:
    fim = make(byte_level, spm_rate=0.0)
    text = "the quick brown fox jumps over the lazy dog and then some more of it all "
    document = byte_level.encode_plain(text)
    starts, ends = set(), set()
    for key in range(3000):
        found = fim(np.array(document), [len(document)], key).tolist()
        if found != document:
            _, prefix, middle, _ = parts_of(found, byte_level)
            start = len(byte_level.decode(prefix))
            starts.add(start)
            ends.add(start + len(byte_level.decode(middle)))
    assert starts >= set(range(40))
    assert ends >= set(range(2, 40))


def test_rate_0_changes_nothing_and_the_sample_given_is_never_written(
    sentences: list[str], byte_level: HuggingFaceTokenizer
) -> None:
    tokens = np.array(documents(byte_level, sentences)[0])
    before = tokens.copy()
    assert np.array_equal(make(byte_level, rate=0.0)(tokens, [len(tokens)], b"key"), before)
    assert not np.array_equal(make(byte_level)(tokens, [len(tokens)], b"key"), before)
    assert np.array_equal(tokens, before)


def test_each_stretch_is_rearranged_within_itself(tokenizer: TokenizerProtocol, sentences: list[str]) -> None:
    fim = make(tokenizer)
    stretches = [
        document[5:] if number == 0 else document for number, document in enumerate(documents(tokenizer, sentences)[:6])
    ]
    stretches[-1] = stretches[-1][:40]
    sample = np.array([token for stretch in stretches for token in stretch])
    lengths = [len(stretch) for stretch in stretches]
    found = fim(sample, lengths, b"seed 1, sample 2")
    assert np.array_equal(found, fim(sample, lengths, b"seed 1, sample 2"))
    assert not np.array_equal(found, fim(sample, lengths, b"seed 1, sample 3"))
    changed = 0
    for stretch, part in zip(stretches, np.split(found, np.cumsum(lengths)[:-1]), strict=True):
        if part.tolist() != stretch:
            changed += 1
            ends = stretch[-1] == tokenizer.eod_id
            assert (part[-1] == tokenizer.eod_id) == ends
            parts_of(part[:-1].tolist() if ends else part.tolist(), tokenizer)
    assert changed >= 3


def test_every_stretch_of_a_sample_is_cut_elsewhere(sentences: list[str], byte_level: HuggingFaceTokenizer) -> None:
    document = documents(byte_level, sentences)[0]
    found = make(byte_level)(np.array(document * 8), [len(document)] * 8, 1)
    assert len({stretch.tobytes() for stretch in np.split(found, 8)}) > 5


def test_what_a_key_draws_never_changes(byte_level: HuggingFaceTokenizer) -> None:
    """A run resumed under another version of numpy or Python reads the same samples."""
    document = byte_level.encode_plain("0123456789" * 10)
    found = make(byte_level)(np.array(document), [len(document)], b"7 11").tolist()
    form, prefix, middle, suffix = parts_of(found, byte_level)
    assert (form, len(prefix), len(middle), len(suffix)) == ("PSM", 40, 40, 17)
    assert make(byte_level)(np.array(document), [len(document)], 5).tolist() != found


def test_what_cannot_be_rearranged_stays(sentences: list[str], byte_level: HuggingFaceTokenizer) -> None:
    fim, eod = make(byte_level), byte_level.eod_id
    assert eod is not None
    text = byte_level.encode_plain("".join(sentences[:5]))
    prefix_id = fim_tokens(byte_level)[0]
    longer_than_needed = [token for letter in "quick brown fox" for token in byte_level.encode_plain(letter)]
    half_a_character = byte_level.encode_plain("\U0001f98b")[1:]
    for stretch in (
        [eod],
        [5],
        [eod, eod],
        [*text[:20], eod, *text[20:]],
        [*text, prefix_id, *text],
        half_a_character + text,
        longer_than_needed,
    ):
        for key in range(5):
            assert fim(np.array(stretch), [len(stretch)], key).tolist() == stretch


def test_an_end_of_document_that_is_no_control_token_stays_at_the_end(
    sentences: list[str], byte_level: HuggingFaceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_level, "control_tokens", {})
    document = documents(byte_level, sentences)[0]
    found = make(byte_level)(np.array(document), [len(document)], 1).tolist()
    assert found != document
    assert found[-1] == byte_level.eod_id


def test_control_tokens_at_both_ends_stay_there(sentences: list[str], byte_level: HuggingFaceTokenizer) -> None:
    assert byte_level.eod_id is not None
    text = byte_level.encode_plain("".join(sentences[:5]))
    ends = [byte_level.eod_id] * 2
    found = make(byte_level)(np.array([*ends, *text, *ends]), [len(text) + 4], 4).tolist()
    assert found[:2] == found[-2:] == ends
    parts_of(found[2:-2], byte_level)


def test_names_of_control_tokens_in_text_stay_text(tokenizer: TokenizerProtocol) -> None:
    text = "what is <|fim_middle|> for, and <|endoftext|>? " * 4
    document, changed = tokenizer.encode_plain(text), 0
    assert not set(fim_tokens(tokenizer)) & set(document)
    for key in range(20):
        found = make(tokenizer)(np.array(document), [len(document)], key).tolist()
        if found != document:
            changed += 1
            _, prefix, middle, suffix = parts_of(found, tokenizer)  # each name stands once as a token
            begun = tokenizer.decode([*prefix, *middle, *suffix])
            assert tokenizer.decode(document).startswith(begun.rstrip("\ufffd"))
            assert begun.count("<|fim_middle|>") > 1, "the names in the text are gone"
    assert changed > 10


def test_a_normaliser_that_changes_text_loses_none(sentences: list[str]) -> None:
    """The rule that drops spaces at a text's ends: cuts beside a space are passed over."""
    tokenizer = train_sentencepiece(sentences, NAMES, model_type="bpe")
    changed = 0
    for number, document in enumerate(documents(tokenizer, sentences)):
        found = make(tokenizer)(np.array(document), [len(document)], number).tolist()
        if found != document:
            changed += 1
            _, prefix, middle, suffix = parts_of(found[:-1], tokenizer)
            begun = tokenizer.decode([*prefix, *middle, *suffix]).rstrip("\ufffd")
            assert tokenizer.decode(document).startswith(begun)
    assert changed > 5


def test_lengths_must_fit_the_sample(byte_level: HuggingFaceTokenizer) -> None:
    with pytest.raises(ValueError, match="stretches of 3 tokens in a sample of 4"):
        make(byte_level)(np.arange(4), [1, 2], 0)


class Vocabulary:
    """As much of a tokenizer as the look-up of names takes."""

    def __init__(self, *names: str) -> None:
        self.control_tokens = {name: 10 + place for place, name in enumerate(names)}

    def token_id(self, name: str) -> int | None:
        return self.control_tokens.get(name)


@pytest.mark.parametrize("names", FIM_TOKENS)
def test_known_names_are_found(names: tuple[str, str, str]) -> None:
    assert fim_tokens(Vocabulary("<other>", *names)) == (11, 12, 13)  # pyright: ignore[reportArgumentType]


def test_given_names_come_first() -> None:
    vocabulary = Vocabulary(*FIM_TOKENS[0], "<a>", "<b>", "<c>")
    assert fim_tokens(vocabulary, ("<c>", "<a>", "<b>")) == (15, 13, 14)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("<fim_prefix>", "<fim_midle>", "<fim_suffix>"), "no token '<fim_midle>'; did you mean '<fim_middle>'?"),
        (("<fim_prefix>", "<fim_prefix>", "<fim_suffix>"), "one token stands twice"),
    ],
)
def test_wrong_names_are_refused(names: tuple[str, str, str], message: str) -> None:
    with pytest.raises(UserError) as error:
        fim_tokens(Vocabulary(*FIM_TOKENS[1]), names)  # pyright: ignore[reportArgumentType]
    assert message in str(error.value)


def test_a_tokenizer_without_such_tokens_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.fim_rate: .*name its own in data\.fim_tokens"):
        fim_tokens(Vocabulary("<s>"))  # pyright: ignore[reportArgumentType]
