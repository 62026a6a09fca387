import base64
import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megalite.data.preprocess import long_text
from megalite.data.preprocess.encode_shard import encode_long
from megalite.data.preprocess.long_text import LongText
from megalite.data.tokenizers.control_tokens import TextRefused, refusals_named
from megalite.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megalite.data.tokenizers.load import load_tokenizer, standard_files, tokenizer_paths
from megalite.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from megalite.data.tokenizers.tiktoken_tokenizer import ENCODINGS
from megalite.data.tokenizers.train_sentencepiece import train_sentencepiece
from megalite.errors import UserError

TRICKY = st.text(alphabet="ab eE \n\t\r.,_12²é\u0301\u2581漢😀\x00<>|\u00a0\u3000'", max_size=30)


def train(texts, **options) -> bytes:
    model = io.BytesIO()
    settings = {"vocab_size": 320, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **settings)
    return model.getvalue()


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path):
    return load_tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def reference(tokenizer_path):
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=50), TRICKY))
def test_text_comes_back_as_it_was(tokenizer, text):
    # U+2581 is sentencepiece's own sign for a space.
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(st.one_of(st.text(max_size=50), TRICKY))
def test_the_word_cache_is_exact(tokenizer, reference, text):
    assert tokenizer._words is not None
    assert tokenizer.encode(text) == reference.encode(text)


def test_the_word_cache_is_exact_on_prose(tokenizer, reference, sentences):
    assert tokenizer.encode_batch(sentences) == reference.encode(sentences)
    text = "".join(sentences)
    assert tokenizer.encode(text) == reference.encode(text)


def test_the_word_cache_is_bounded(tokenizer_path, reference, monkeypatch):
    monkeypatch.setattr("megalite.data.tokenizers.sentencepiece_tokenizer._WordCache._MAX_WORDS", 5)
    tokenizer = SentencePieceTokenizer(tokenizer_path.read_bytes())
    text = "seven wizards quietly box jugs of liquid over and over " + "x" * 100
    assert tokenizer.encode(text) == reference.encode(text)
    assert tokenizer._words is not None
    assert len(tokenizer._words) == 5


@pytest.mark.parametrize(
    ("options", "cached"),
    [
        ({"normalization_rule_name": "identity", "remove_extra_whitespaces": False}, True),
        ({"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}, True),
        (
            {
                "model_type": "unigram",
                "vocab_size": 300,
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "split_digits": True,
            },
            False,
        ),
        ({"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": False}, False),
        ({"normalization_rule_name": "identity", "remove_extra_whitespaces": True}, False),
        (
            {
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "split_by_whitespace": False,
                "vocab_size": 600,
                "split_by_unicode_script": False,
            },
            False,
        ),
        (
            {
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "user_defined_symbols": ["fox jumps"],
            },
            False,
        ),
    ],
)
def test_models_of_others_encode_as_sentencepiece_does(sentences, options, cached):
    model = train(sentences, **options)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = SentencePieceTokenizer(model)
    assert (ours._words is not None) == cached
    for text in [*sentences, "", " ", "  two  spaces ", "ﬁ ① fox jumps", "\u2581x\u2581\u2581 y", "a\n b"]:
        assert ours.encode(text) == theirs.encode(text)
        (array,) = ours.encode_arrays([text])
        assert array.dtype == np.int32
        assert array.tolist() == theirs.encode(text)


def test_the_ids_stand_where_readers_of_llama_models_expect_them(tokenizer, reference):
    assert [reference.id_to_piece(i) for i in (0, 1, 2, 3, 258)] == [
        "<unk>",
        "<s>",
        "<|endoftext|>",
        "<0x00>",
        "<0xFF>",
    ]
    assert tokenizer.vocab_size == 400
    assert tokenizer.eod_id == 2
    assert reference.eos_id() == 2


def test_control_tokens_in_text_stay_text(tokenizer):
    text = "<|endoftext|><s>"
    ids = tokenizer.encode(text)
    assert tokenizer.eod_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*tokenizer.encode("the fox"), 2]) == "the fox"


def test_digits_stand_alone(reference):
    pieces = [piece.strip("\u2581") for piece in reference.encode("4242", out_type=str)]
    assert [piece for piece in pieces if piece] == ["4", "2", "4", "2"]


def test_training_twice_gives_the_same_bytes(tmp_path, sentences, write_jsonl, tokenizer_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", sentences)
    report = train_sentencepiece([corpus], vocab_size=400, output=tmp_path / "new" / "again.model")
    assert (tmp_path / "new" / "again.model").read_bytes() == tokenizer_path.read_bytes()
    assert (report.documents, report.documents_used) == (300, 300)
    assert report.text_bytes_used == sum(map(len, sentences))
    assert load_tokenizer(tokenizer_path).digest == hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()


def test_training_is_silent(tmp_path, sentences, write_jsonl, capfd):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", sentences)
    train_sentencepiece([corpus], vocab_size=400, output=tmp_path / "tok.model")
    assert capfd.readouterr() == ("", "")


def test_a_large_corpus_is_sampled_by_seed(tmp_path, sentences, write_jsonl):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", sentences)
    models = []
    for seed in (1, 1, 2):
        report = train_sentencepiece(
            [corpus], vocab_size=330, output=tmp_path / "tok.model", seed=seed, sample_bytes=6000
        )
        models.append((tmp_path / "tok.model").read_bytes())
        assert 5000 < report.text_bytes_used <= 6000
        assert report.documents_used < report.documents == 300
    assert models[0] == models[1] != models[2]


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (8192, r"--vocab-size=8192: the text yields (\d+) pieces; use \1, or more text"),
        (100, r"--vocab-size=100: bytes and characters alone need \d+"),
    ],
)
def test_a_vocabulary_that_does_not_fit_the_text_is_refused(tmp_path, write_jsonl, vocab_size, message):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", ["hello world"])
    with pytest.raises(UserError, match=message):
        train_sentencepiece([corpus], vocab_size=vocab_size, output=tmp_path / "tok.model")
    assert not (tmp_path / "tok.model").exists()


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_training_without_text_is_refused(tmp_path, write_jsonl, texts):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts)
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        train_sentencepiece([corpus], vocab_size=400, output=tmp_path / "tok.model")


@pytest.mark.parametrize("name", ["tok.model", "tokenizer.json"])
@pytest.mark.parametrize("data", [b"", b"garbage", b'{"version": "1.0"}'])
def test_a_broken_tokenizer_is_named(tmp_path, name, data, capfd):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: not a"):
        load_tokenizer(tmp_path / name)
    assert capfd.readouterr() == ("", "")


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.model: no such tokenizer; make one with `megalite tokenizer train"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_model_without_endoftext_ends_documents_with_its_own_mark(sentences):
    assert SentencePieceTokenizer(train(sentences)).eod_id == 2
    assert SentencePieceTokenizer(train(sentences, eos_piece="<end>")).eod_id == 2
    assert SentencePieceTokenizer(train(sentences, eos_id=-1)).eod_id is None


@pytest.fixture
def hugging_face_path(tmp_path):
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "<|endoftext|>": 9}
    model = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")], unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    model.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 9)]
    )
    model.add_special_tokens(["<|endoftext|>"])
    model.enable_truncation(2)
    model.enable_padding(length=7)
    model.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_hugging_face_tokenizer_adds_cuts_and_fills_nothing(hugging_face_path):
    tokenizer = load_tokenizer(hugging_face_path)
    assert tokenizer.encode("ab a b ab") == [3, 1, 2, 3]
    assert tokenizer.encode_batch(["ab a b ab", "a", ""]) == [[3, 1, 2, 3], [1], []]
    assert [array.tolist() for array in tokenizer.encode_arrays(["ab", ""])] == [[3], []]
    assert all(array.dtype == np.int32 for array in tokenizer.encode_arrays(["ab", ""]))
    assert tokenizer.decode([3, 9]) == "ab"
    assert tokenizer.digest == hashlib.sha256(hugging_face_path.read_bytes()).hexdigest()


def test_a_vocabulary_with_gaps_counts_to_its_largest_id(hugging_face_path):
    tokenizer = load_tokenizer(hugging_face_path.parent)
    assert tokenizer.vocab_size == 10
    assert tokenizer.eod_id == 9


def test_a_vocabulary_without_endoftext_has_no_end_of_document(hugging_face_path):
    content = json.loads(hugging_face_path.read_text())
    content["post_processor"] = None
    content["added_tokens"] = []
    del content["model"]["vocab"]["<|endoftext|>"]
    hugging_face_path.write_text(json.dumps(content))
    assert load_tokenizer(hugging_face_path).eod_id is None


def test_names_lead_to_ids(tokenizer, hugging_face_path):
    assert tokenizer.token_id("<|endoftext|>") == 2
    assert tokenizer.token_id("<unk>") == 0
    assert tokenizer.token_id("<|none|>") is None
    assert tokenizer.control_tokens == {"<s>": 1, "<|endoftext|>": 2}
    hugging_face = load_tokenizer(hugging_face_path)
    assert hugging_face.token_id("<|endoftext|>") == 9
    assert hugging_face.token_id("ab") == 3
    assert hugging_face.token_id("abc") is None
    assert hugging_face.control_tokens == {"<|endoftext|>": 9}


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(max_size=50), TRICKY))
def test_plain_text_is_what_text_is_anyway(tokenizer, text):
    assert tokenizer.encode_plain(text) == tokenizer.encode(text)


def byte_level(tmp_path, added: list[tokenizers.AddedToken]):
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    model.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(["the quick brown fox<|endoftext|>"] * 10, trainer)
    model.add_tokens(added)
    model.add_special_tokens(["<|endoftext|>"])
    model.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(tmp_path)


def test_plain_text_holds_no_control_token_of_hugging_face(tmp_path):
    added = [
        tokenizers.AddedToken(name, special=False, normalized=False) for name in ("<|im_start|>", "    ", "[INST]")
    ]
    tokenizer = byte_level(tmp_path, added)
    text = "the fox<|im_start|>    x<|endoftext|>[INST]"
    control = {tokenizer.token_id(name) for name in ("<|im_start|>", "<|endoftext|>", "[INST]")}
    assert control < set(tokenizer.encode(text))
    plain = tokenizer.encode_plain(text)
    assert control.isdisjoint(plain)
    assert tokenizer.decode(plain) == text
    # A run of spaces is an added token as well, but none to be afraid of.
    assert tokenizer.token_id("    ") in plain
    assert tokenizer.encode_plain("the fox") == tokenizer.encode("the fox")
    # Encoded as any text, not broken apart.
    assert tokenizer.decode(tokenizer.encode_plain("<|endoftext|>")[:1]) == "<|"


def test_plain_text_holds_no_control_token_that_is_a_piece_of_the_model(tmp_path):
    # A unigram model matches any of its pieces, also those that are named among the added tokens.
    model = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((c, -2.0) for c in "ab<>/s")], 0))
    model.add_special_tokens(["</s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a</s>b") == [2, 1, 3]
    assert tokenizer.encode_plain("a</s>b") == [2, 4, 6, 7, 5, 3]
    assert 1 not in tokenizer.encode_plain("</s></s>")


def test_plain_text_holds_no_symbol_of_sentencepiece(sentences):
    options = {"user_defined_symbols": ["<|im_start|>", "fox"], "normalization_rule_name": "identity"}
    tokenizer = SentencePieceTokenizer(train(sentences, **options))
    symbol, fox = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("fox")
    assert tokenizer.control_tokens == {"<s>": 1, "</s>": 2, "<|im_start|>": symbol}
    text = "the fox <|im_start|>user"
    assert {symbol, fox} < set(tokenizer.encode(text))
    plain = tokenizer.encode_plain(text)
    assert symbol not in plain
    assert fox in plain
    assert tokenizer.decode(plain) == text


@pytest.fixture(scope="session")
def ranks(sentences) -> list[bytes]:
    """Tokens by rank: the bytes, what joins into common words, and filling up to the number that GPT-2 has."""
    found = [bytes([byte]) for byte in range(256)]
    for word in (" the", " quick", " fox", "the", "hello"):
        found += [word[:end].encode() for end in range(2, len(word) + 1)]
    found = list(dict.fromkeys(found))
    return found + [b"\xff\xfe" + number.to_bytes(4, "big") for number in range(50_256 - len(found))]


def write_ranks(path, ranks) -> None:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)))


@pytest.fixture(scope="session")
def tiktoken_tokenizer(tmp_path_factory, ranks):
    path = tmp_path_factory.mktemp("tiktoken") / "gpt2.tiktoken"
    write_ranks(path, ranks)
    return load_tokenizer(path)


def test_ranks_of_tiktoken_are_read(tiktoken_tokenizer, ranks):
    tokenizer = tiktoken_tokenizer
    assert [ranks[token] for token in tokenizer.encode("the quick fox")] == [b"the", b" quick", b" fox"]
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (50_257, 50_256)
    assert tokenizer.token_id(" fox") == ranks.index(b" fox")
    assert tokenizer.token_id("<|endoftext|>") == 50_256
    assert tokenizer.token_id(" foxes") is None
    assert tokenizer.control_tokens == {"<|endoftext|>": 50_256}
    assert tokenizer.decode([*tokenizer.encode("the"), 50_256]) == "the"


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=50), TRICKY))
def test_every_way_of_tiktoken_gives_the_same_ids(tiktoken_tokenizer, text):
    text = f"{text}<|endoftext|>"
    ids = tiktoken_tokenizer.encode(text)
    assert 50_256 not in ids
    assert tiktoken_tokenizer.encode_plain(text) == ids
    assert tiktoken_tokenizer.encode_batch([text, "a"])[0] == ids
    (array,) = tiktoken_tokenizer.encode_arrays([text])
    assert array.dtype == np.int32
    assert array.tolist() == ids
    assert tiktoken_tokenizer.decode(ids) == text


def test_the_encodings_of_tiktoken_are_its_own():
    def stop(*_args: object, **_options: object) -> dict[bytes, int]:
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", stop)
        patch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", stop)
        for name, ours in ENCODINGS.items():
            theirs = openai_public.ENCODING_CONSTRUCTORS[name]()
            assert ours.control_tokens == theirs["special_tokens"]
            if "explicit_n_vocab" in theirs:
                assert ours.ranks + len(ours.control_tokens) == theirs["explicit_n_vocab"]
            generator = np.random.default_rng(0)
            for _ in range(300):
                text = "".join(generator.choice(list("aBé 漢1²'sLl\n\r\t.,/!\u00a0"), size=20))
                assert regex.findall(ours.split, text) == regex.findall(theirs["pat_str"], text)


def test_ranks_that_are_none_are_named(tmp_path, ranks):
    path = tmp_path / "gpt2.tiktoken"
    for content, reason in (
        (b"", "no rank for byte 0"),
        (b"aGVsbG8= 1 2\n", "a line is no base64 and rank"),
        (b"aGVsbG8= x\n", "a line is no base64 and rank"),
        (b"!!! 1\n", "a line is no base64 and rank"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"gpt2\.tiktoken: not a file of tiktoken's ranks \({reason}"):
            load_tokenizer(path)
    write_ranks(path, ranks[:-1])
    with pytest.raises(UserError, match=r"50,255 ranks, gpt2 has 50,256"):
        load_tokenizer(path)
    write_ranks(tmp_path / "cl100k.tiktoken", ranks)
    with pytest.raises(UserError, match=r"cl100k\.tiktoken: no encoding of this .*; did you mean 'cl100k_base'"):
        load_tokenizer(tmp_path / "cl100k.tiktoken")


def test_without_its_package_tiktoken_says_what_to_install(tmp_path, ranks, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    write_ranks(tmp_path / "gpt2.tiktoken", ranks)
    with pytest.raises(UserError, match=r"pip install 'megalite\[tiktoken\]'"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["sentencepiece", "cached", "hugging_face", "prepended", "tiktoken"])
def test_a_long_text_in_parts_has_the_ids_of_the_whole(
    kind, sentences, tokenizer, tiktoken_tokenizer, tmp_path, monkeypatch
):
    if kind == "sentencepiece":
        encoder = SentencePieceTokenizer(train(sentences, byte_fallback=True))
        assert encoder._words is None
    elif kind == "prepended":
        byte_level(tmp_path, [])
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        content["pre_tokenizer"]["add_prefix_space"] = True
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        encoder = load_tokenizer(tmp_path)
        assert encoder.decode(encoder.encode("a")) == " a"
    else:
        encoder = {"cached": tokenizer, "tiktoken": tiktoken_tokenizer}.get(kind) or byte_level(tmp_path, [])
    monkeypatch.setattr(long_text, "LONGEST_WHOLE", 400)
    monkeypatch.setattr(long_text, "PART", 200)
    text = "".join(f"{text}  \n\n\t- x\n" for text in sentences)
    parts = list(encode_long(LongText(lambda: [text]), encoder))
    assert len(parts) > 50
    assert np.concatenate(parts).tolist() == encoder.encode(text)


def refusing(folder) -> Path:
    """A tokenizer that has no token for letters beyond "a" and "b", and none for what it does not know."""
    model = tokenizers.Tokenizer(models.Unigram([("\u2581", -1.0), ("a", -2.0), ("b", -2.0)]))
    model.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    model.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_what_the_library_refuses_is_told_without_a_traceback(tmp_path):
    tokenizer = load_tokenizer(refusing(tmp_path))
    ways: list[Any] = [tokenizer.encode, tokenizer.encode_plain, tokenizer.message_encoder(())]
    ways += [lambda text: tokenizer.encode_batch(["a", text]), lambda text: tokenizer.encode_arrays([text, "b"])]
    for way in ways:
        assert way("a b")
        with pytest.raises(TextRefused, match="^the tokenizer refuses this text: .*unk_id") as caught:
            way("a 日本")
        assert isinstance(caught.value, UserError)


def test_only_what_a_library_raises_is_told_as_refused():
    class PanicException(BaseException):
        """Named as that of Rust, which has no class to import."""

    for raised in (Exception("two\nlines"), RuntimeError(), PanicException("index out of bounds")):
        reasons = "(two lines|RuntimeError|index out)"
        with pytest.raises(TextRefused, match=f"^the tokenizer refuses this text: {reasons}"), refusals_named():
            raise raised
    for passed in (KeyboardInterrupt, SystemExit, MemoryError, UserError):
        with pytest.raises(passed), refusals_named():
            raise passed


ADDED = ("<think>", "</think>", "<tool_call>", "[TOOL]", "domainword")


def test_messages_read_the_added_tokens_that_are_not_special(tmp_path):
    added = [tokenizers.AddedToken(name, special=False, normalized=False) for name in (*ADDED, "<|im_end|>", "</s>")]
    tokenizer = byte_level(tmp_path, added)
    text = "<think>\nplan</think> the fox<tool_call>[TOOL]domainword<|im_end|></s><|endoftext|>"
    ids = tokenizer.encode(text)
    found = tokenizer.message_encoder(["<|im_end|>"])(text)
    for name in ADDED:
        assert [tokenizer.token_id(name)] == [token for token in found if token == tokenizer.token_id(name)], name
    for name in ("<|im_end|>", "</s>", "<|endoftext|>"):
        assert tokenizer.token_id(name) in ids
        assert tokenizer.token_id(name) not in found, name
    assert tokenizer.decode(found) == text
    # Whoever does not name it has it read: the file does not call it special.
    assert tokenizer.token_id("<|im_end|>") in tokenizer.message_encoder(())(text)


def test_messages_read_the_symbols_of_sentencepiece_that_are_not_named(sentences):
    options = {"user_defined_symbols": ["<|im_end|>", "<think>"], "normalization_rule_name": "identity"}
    tokenizer = SentencePieceTokenizer(train(sentences, **options))
    end, think = tokenizer.token_id("<|im_end|>"), tokenizer.token_id("<think>")
    text = "<think> the fox <|im_end|></s>"
    named, unnamed = tokenizer.message_encoder(["<|im_end|>"])(text), tokenizer.message_encoder([])(text)
    assert think in named
    assert end not in named
    assert {think, end} < set(unnamed)
    assert 2 not in unnamed
    assert tokenizer.decode(named) == tokenizer.decode(unnamed) == text


@pytest.mark.parametrize("ids", [(6000, 6001), (1001, 1000), (300, 302), (0, 1)])
def test_added_tokens_have_the_ids_that_the_library_gives_them(tmp_path, ids):
    added = [tokenizers.AddedToken(name, special=True, normalized=False) for name in ("<|im_start|>", "<|im_end|>")]
    byte_level(tmp_path, added)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for token, told in zip(content["added_tokens"][-2:], ids, strict=True):
        token["id"] = told
    content["added_tokens"].append({**content["added_tokens"][-1], "content": "", "id": 999})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.control_tokens
    for name, token in tokenizer.control_tokens.items():
        assert token == theirs.token_to_id(name) == tokenizer.token_id(name)
        assert tokenizer.encode(name) == [token]
        assert token not in tokenizer.encode_plain(name)
    assert tokenizer.vocab_size == theirs.get_vocab_size()
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert any(str(told) in note for told in ids for note in tokenizer.notes)


def gpt2_pair(folder, sentences):
    """GPT-2's two files, and the tokenizer of which they are."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    model.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(sentences, trainer)
    model.add_special_tokens(["<|endoftext|>"])
    content = json.loads(model.to_str())["model"]
    vocabulary = {**content["vocab"], "<|endoftext|>": len(content["vocab"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(pair) for pair in content["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return model


def test_the_two_files_of_gpt2_are_a_tokenizer(tmp_path, sentences):
    theirs = gpt2_pair(tmp_path, sentences)
    texts = [*sentences[:20], "naïve 漢 🦊\n\n  x", "# not a comment", "<|endoftext|>", ""]
    loaded = [load_tokenizer(tmp_path / name) for name in ("", "vocab.json", "merges.txt")]
    for text in texts:
        assert all(ours.encode(text) == theirs.encode(text).ids for ours in loaded)
        assert loaded[0].decode(loaded[0].encode(text)) == text.replace("<|endoftext|>", "")
    assert (loaded[0].eod_id, loaded[0].vocab_size) == (theirs.token_to_id("<|endoftext|>"), theirs.get_vocab_size())
    # What a run keeps of it is the same tokenizer, by its digest as well, whatever the files' marks and line ends are.
    (tmp_path / "kept").mkdir()
    for name, data in standard_files(tmp_path).items():
        (tmp_path / "kept" / name).write_bytes(data)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["tokenizer.json"]
    assert {ours.digest for ours in loaded} == {load_tokenizer(tmp_path / "kept").digest}
    (tmp_path / "merges.txt").write_bytes(
        b"\xef\xbb\xbf" + (tmp_path / "merges.txt").read_bytes().replace(b"\n", b"\r\n")
    )
    assert load_tokenizer(tmp_path).digest == loaded[0].digest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("merges.txt", None, "merges.txt: no such file; GPT-2's tokenizer is a vocab.json and a merges.txt"),
        ("vocab.json", "[]", "vocab.json: holds no JSON object"),
        ("vocab.json", "{}", "vocab.json: holds no token"),
        ("vocab.json", '{"a": -1}', "vocab.json: token 'a' has id -1; an id is a whole number from 0 on"),
        ("vocab.json", '{"a": 4294967296}', "vocab.json: token 'a' has id 4294967296"),
        ("vocab.json", '{"a": 1.0}', "vocab.json: token 'a' has id 1.0"),
        ("vocab.json", '{"a": true}', "vocab.json: token 'a' has id True"),
        ("vocab.json", '{"a": 1, "b": 1}', "vocab.json: id 1 is that of 'a' and of 'b'"),
        ("merges.txt", "#version\na b c\n", "merges.txt:2: 'a b c' is no merge of two tokens of the vocab.json beside"),
        ("merges.txt", "a\n", "merges.txt:1: 'a' is no merge"),
        ("merges.txt", "a b\n", "merges.txt:1: 'a b' is no merge"),
        ("merges.txt", "\udcff", "merges.txt: byte 0 is no UTF-8"),
    ],
)
def test_broken_files_of_gpt2_are_named(tmp_path, name, content, message):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("")
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path / "vocab.json")
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


def beside_model(folder, sentences, **files):
    """A tokenizer.model with files beside it."""
    data = train(sentences, normalization_rule_name="identity", remove_extra_whitespaces=False)
    (folder / "tokenizer.model").write_bytes(data)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("form", ["added_tokens", "tokenizer_config"])
def test_tokens_that_files_add_to_a_model_are_read(tmp_path, sentences, form):
    names = {"<|im_start|>": 320, "<|im_end|>": 321, "<think>": 325}
    decoder = {str(token): {"content": name, "special": name != "<think>"} for name, token in names.items()}
    content = {"added_tokens": names, "tokenizer_config": {"added_tokens_decoder": decoder}}[form]
    tokenizer = load_tokenizer(beside_model(tmp_path, sentences, **{form: content}))
    bare = SentencePieceTokenizer((tmp_path / "tokenizer.model").read_bytes())
    assert tokenizer.vocab_size == 326
    assert {name: tokenizer.token_id(name) for name in names} == names
    assert tokenizer.token_name(325) == "<think>"
    assert names.items() <= tokenizer.control_tokens.items()
    text = "<think> the fox\n  <|im_end|><|im_end|> jumps <thin"
    ids = tokenizer.encode(text)
    assert [token for token in ids if token >= 320] == [325, 321, 321]
    assert [array.tolist() for array in tokenizer.encode_arrays([text, "the fox", ""])] == [
        ids,
        bare.encode("the fox"),
        [],
    ]
    assert tokenizer.encode_batch([text]) == [ids]
    assert tokenizer.encode_plain(text) == bare.encode_plain(text)
    message = tokenizer.message_encoder(["<|im_start|>", "<|im_end|>"])(text)
    assert [token for token in message if token >= 320] == [325]
    assert tokenizer.decode(message) == text
    shown = text if form == "added_tokens" else text.replace("<|im_end|>", "")
    assert tokenizer.decode(ids) == shown
    assert tokenizer.decode([*bare.encode("the fox"), 324, 400]) == "the fox"
    # The same file elsewhere is the same tokenizer; without its tokens it is another.
    (tmp_path / "kept").mkdir()
    for name, data in standard_files(tmp_path).items():
        (tmp_path / "kept" / name).write_bytes(data)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["added_tokens.json", "tokenizer.model"]
    assert load_tokenizer(tmp_path / "kept").digest == tokenizer.digest != bare.digest


def test_tokens_of_the_model_itself_that_files_name_change_nothing(tmp_path, sentences):
    decoder = {"0": {"content": "<unk>"}, "1": {"content": "<s>"}, "2": {"content": "</s>"}}
    folder = beside_model(tmp_path, sentences, tokenizer_config={"added_tokens_decoder": decoder})
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.notes == ()
    assert tokenizer.digest == hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest()
    (folder / "added_tokens.json").write_text('{"<pad>": 0}')
    (folder / "tokenizer_config.json").unlink()
    (note,) = load_tokenizer(folder).notes
    assert note == "'<pad>', which a file beside adds as id 0, is not read: the id is that of '<unk>'"
    (folder / "other.model").write_bytes((folder / "tokenizer.model").read_bytes())
    assert load_tokenizer(folder / "other.model").notes == ()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"added_tokens": {"<a>": -1}},
            r"added_tokens\.json: token '<a>' has id -1; an id is a whole number from 0 on",
        ),
        ({"added_tokens": {"<a>": 1 << 31}}, r"added_tokens\.json: token '<a>' has id 2147483648"),
        ({"added_tokens": {"<a>": "400"}}, r"added_tokens\.json: token '<a>' has id '400'"),
        ({"added_tokens": {"": 400}}, r"added_tokens\.json: token '' has id 400"),
        ({"added_tokens": {"<a>": 400, "<b>": 400}}, r"added_tokens\.json: id 400 is that of '<a>' and of '<b>'"),
        ({"added_tokens": []}, r"added_tokens\.json: holds no JSON object"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "a"}}}},
            r"config\.json: token 'a' has id 'x'",
        ),
        ({"tokenizer_config": {"added_tokens_decoder": {"400": "a"}}}, r"added_tokens_decoder\.400 has no text"),
    ],
)
def test_broken_files_of_added_tokens_are_named(tmp_path, sentences, files, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(beside_model(tmp_path, sentences, **files))


def test_what_begins_a_text_is_found(tmp_path, sentences, hugging_face_path):
    assert SentencePieceTokenizer(train(sentences)).bos_id == 1
    assert SentencePieceTokenizer(train(sentences, bos_id=-1)).bos_id is None
    (tmp_path / "pair").mkdir()
    gpt2_pair(tmp_path / "pair", sentences)
    pair = load_tokenizer(tmp_path / "pair")
    assert (pair.bos_id, pair.leading_id, pair.unknown_id) == (None, None, None)
    # The post-processor of this file puts its one token before every text.
    assert load_tokenizer(hugging_face_path).leading_id == 9
    content = json.loads(hugging_face_path.read_text())
    content["post_processor"] = None
    hugging_face_path.write_text(json.dumps(content))
    assert load_tokenizer(hugging_face_path).leading_id is None


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("tok", "nothing is fetched by its name: give a tokenizer.json.*--output tok.model`$"),
        ("gpt2", "nothing from a network: .*`hf download gpt2 --local-dir models/gpt2`"),
        ("meta-llama/Llama-2-7b", "`hf download meta-llama/Llama-2-7b --local-dir .*, and write models/Llama-2-7b$"),
        ("tok.model", "make one with `megalite tokenizer train INPUT --output tok.model`, or give another$"),
        ("x/tokenizer.json", "no such tokenizer; give another, which may be a tokenizer.json"),
    ],
)
def test_a_tokenizer_that_is_not_there_is_told_with_a_fix_that_fits(name, fix):
    with pytest.raises(UserError, match=fix):
        load_tokenizer(Path(name))


def test_a_tokenizers_files_have_the_names_under_which_they_are_looked_for(tmp_path, sentences, tokenizer_path):
    assert tokenizer_paths(tokenizer_path) == {"tokenizer.model": tokenizer_path}
    gpt2_pair(tmp_path, sentences)
    pair = {name: tmp_path / name for name in ("vocab.json", "merges.txt")}
    assert tokenizer_paths(tmp_path) == tokenizer_paths(tmp_path / "merges.txt") == pair
    beside_model(tmp_path, sentences, added_tokens={"<a>": 400})
    files = {name: tmp_path / name for name in ("tokenizer.model", "added_tokens.json")}
    assert tokenizer_paths(tmp_path) == tokenizer_paths(tmp_path / "tokenizer.model") == files
