import hashlib
import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from megalite.data.tokenizer import SentencePieceTokenizer, load_tokenizer, train_sentencepiece
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


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=50), TRICKY))
def test_text_comes_back_as_it_was(tokenizer, text):
    # U+2581 is sentencepiece's own sign for a space.
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


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
    monkeypatch.setattr("megalite.data.tokenizer._WordCache._MAX_WORDS", 5)
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
