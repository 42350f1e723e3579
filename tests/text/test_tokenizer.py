import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from nautile.core.errors import UserError
from nautile.text.pretokenize import byte_alphabet
from nautile.text.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer

MIXED = "def f(x):\n        return x + 1234 中文かな\t\r\n\r\n  \x00\x01 é😀 e\u0301 \u200d"


@settings(deadline=None)
@given(text=st.text())
def test_every_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "\n", "a", "｜", "<"])).map("".join))
def test_names_of_special_tokens_are_text_unless_asked_for(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(range(len(SPECIAL_TOKENS)))


def test_special_tokens_have_v3s_order_and_roles(tokenizer):
    markup = "".join(SPECIAL_TOKENS)
    assert tokenizer.encode(markup, parse_special=True) == list(range(len(SPECIAL_TOKENS)))
    roles = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    gaps = (tokenizer.fim_hole_id, tokenizer.fim_begin_id, tokenizer.fim_end_id)
    assert roles == (0, 1, 2)
    assert gaps == (3, 4, 5)
    assert tokenizer.decode(range(len(SPECIAL_TOKENS))) == "<think></think>"
    assert tokenizer.decode(range(len(SPECIAL_TOKENS)), skip_special_tokens=False) == markup


def learnt_texts(tokenizer):
    for token in range(len(SPECIAL_TOKENS) + 256, tokenizer.vocab_size):
        yield tokenizer.token_bytes(token).decode("utf-8", "ignore")


def test_no_token_crosses_a_cut(tokenizer):
    for text in learnt_texts(tokenizer):
        assert len(text) == 1 or not any(character.isdigit() for character in text), text
        assert text.strip("\r\n") in (text, ""), f"{text!r} joins a line end with something else"
        assert all(map(ideograph, text)) or not any(map(ideograph, text)), text


def ideograph(character):
    return "一" <= character <= "龥"


def test_the_cuts_were_all_learnt_around(tokenizer):
    """The test above would pass on a vocabulary of bytes."""
    texts = set(learnt_texts(tokenizer))
    assert {"中文文本", " return", "\n\n", "       "} <= texts


def test_indentation_is_two_tokens_with_its_word(tokenizer):
    indented = tokenizer.encode("        return")
    assert [tokenizer.decode([token]) for token in indented] == ["       ", " return"]


@pytest.mark.parametrize("size", [266, 267, 400, 5000])
def test_vocabulary_has_exactly_the_size_asked_for(size):
    trained = train_tokenizer(["a short text, a short text"], size)
    assert trained.vocab_size == size
    assert trained.decode(trained.encode(MIXED)) == MIXED
    assert trained.decode([size - 1], skip_special_tokens=True) == ("" if size == 5000 else trained.decode([size - 1]))


def test_vocabulary_too_small_for_bytes_is_refused():
    with pytest.raises(UserError, match="vocab_size 265"):
        train_tokenizer(["text"], 265)


def test_training_is_deterministic(library_texts, tmp_path):
    for name in ("one", "two"):
        train_tokenizer(library_texts, 600).save(tmp_path / name)
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.encode(MIXED) == tokenizer.encode(MIXED)
        assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (0, 1, 2, 1000)


def test_transformers_reads_it_and_agrees(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = MIXED + "<｜User｜>hi<think>hm</think>"
    assert theirs.encode(text) == [tokenizer.bos_id, *tokenizer.encode(text, parse_special=True)]
    assert theirs.decode(tokenizer.encode(text)) == text
    special = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert special == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)


@given(ids=st.lists(st.integers(0, 999)))
def test_decoding_equals_the_tokenizers_library(tokenizer, ids, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "oracle" / "tokenizer.json"
    if not file.exists():
        tokenizer.save(file.parent)
    theirs = tokenizers.Tokenizer.from_file(str(file))
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_byte_alphabet_is_gpt2s():
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_half_a_surrogate_pair_is_a_sentence(tokenizer):
    with pytest.raises(UserError, match=r"U\+D83D at character 2"):
        tokenizer.encode("ab\ud83d")


def test_missing_and_foreign_files_are_sentences(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load(tmp_path)
    for content in (b"not json", b"\xff\xfe\x00", b"[]", b'{"model": {"type": "Unigram"}, "decoder": null}'):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(UserError, match="is not a byte-level BPE tokenizer"):
            Tokenizer.load(tmp_path)
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="is not a byte-level BPE tokenizer"):
        Tokenizer.load(tmp_path)


def test_roles_come_from_the_config_beside_it(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config = {"eos_token": {"content": "<｜User｜>"}, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_id, loaded.bos_id) == (6, 0)


def test_without_an_end_token_it_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    renamed = json.dumps(fields, ensure_ascii=False).replace("<｜end▁of▁sentence｜>", "<done>")
    (tmp_path / "tokenizer.json").write_text(renamed, "utf-8")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="no end-of-text token"):
        Tokenizer.load(tmp_path)
