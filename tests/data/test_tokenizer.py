import base64
import hashlib
import io
import json
import sys

import numpy as np
import pytest
import regex
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megalite.data.preprocessing import long_text
from megalite.data.preprocessing.encoding import encode_long
from megalite.data.preprocessing.long_text import LongText
from megalite.data.tokenizer import load_tokenizer, train_sentencepiece
from megalite.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from megalite.data.tokenizers.tiktoken_tokenizer import ENCODINGS
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
