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
    assert (loaded.eos_id, loaded.bos_id) == (6, 6)  # null: there is none, and the end token begins documents
    assert not loaded.adds_bos
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<｜User｜>"}', "utf-8")
    assert Tokenizer.load(tmp_path).bos_id == 0  # not mentioned: by its usual name


def test_without_an_end_token_it_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    renamed = json.dumps(fields, ensure_ascii=False).replace("<｜end▁of▁sentence｜>", "<done>")
    (tmp_path / "tokenizer.json").write_text(renamed, "utf-8")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="no end-of-text token"):
        Tokenizer.load(tmp_path)


def altered(tokenizer, folder, change, config):
    """A tokenizer whose tokenizer.json was changed and which has this tokenizer_config.json."""
    tokenizer.save(folder)
    fields = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    change(fields)
    (folder / "tokenizer.json").write_text(json.dumps(fields, ensure_ascii=False), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return Tokenizer.load(folder)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<｜begin▁of▁sentence｜>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {
        "<｜begin▁of▁sentence｜>": {"id": "<｜begin▁of▁sentence｜>", "ids": [0], "tokens": ["<｜begin▁of▁sentence｜>"]}
    },
}


@pytest.mark.parametrize(
    ("config", "processor", "adds"),
    [
        ({"add_bos_token": True}, BYTE_LEVEL, True),
        ({"add_bos_token": False}, TEMPLATE, False),
        ({}, TEMPLATE, True),
        ({}, {"type": "Sequence", "processors": [BYTE_LEVEL, TEMPLATE]}, True),  # Llama 3
        ({"tokenizer_class": "LlamaTokenizerFast"}, {**TEMPLATE, "single": TEMPLATE["single"][1:]}, False),
        ({"tokenizer_class": "LlamaTokenizerFast"}, BYTE_LEVEL, True),
        ({"tokenizer_class": "Qwen2Tokenizer", "bos_token": None}, BYTE_LEVEL, False),
        ({"add_bos_token": True, "bos_token": None}, TEMPLATE, False),
        ({}, None, False),
    ],
)
def test_whether_a_text_gets_a_begin_token(tokenizer, tmp_path, config, processor, adds):
    loaded = altered(tokenizer, tmp_path, lambda fields: fields.update(post_processor=processor), config)
    assert loaded.adds_bos is adds


def test_the_chat_template_and_all_settings_survive_saving(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a")
    config = {"bos_token": None, "add_bos_token": False, "chat_template": "{{ messages }}", "model_max_length": 77}
    (tmp_path / "a/tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    Tokenizer.load(tmp_path / "a").save(tmp_path / "b")
    saved = json.loads((tmp_path / "b/tokenizer_config.json").read_text("utf-8"))
    assert config.items() <= saved.items()
    (tmp_path / "a/chat_template.jinja").write_text("newer", "utf-8")
    Tokenizer.load(tmp_path / "a").save(tmp_path / "c")
    assert Tokenizer.load(tmp_path / "c").settings.chat_template == "newer"


def test_transformers_applies_a_saved_chat_template(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path / "a")
    (tmp_path / "a/chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}", "utf-8")
    Tokenizer.load(tmp_path / "a").save(tmp_path / "b")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    text = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<｜begin▁of▁sentence｜>hi"


def test_a_settings_file_that_is_none_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for broken in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(broken)
        with pytest.raises(UserError, match="tokenizer_config"):
            Tokenizer.load(tmp_path)


def test_letters_among_the_added_tokens_are_text(tokenizer, tmp_path):
    """DeepSeek-Coder and DeepSeek-LLM have ids of their own for ü and twelve other letters."""
    markup, letter, end = "<｜tool｜>", "ü", "<|EOT|>"

    def add(fields):
        top, vocab = tokenizer.vocab_size, fields["model"]["vocab"]
        vocab["unused"] = vocab.pop("ü")  # the byte FC, which no text contains
        for i, name in enumerate((markup, letter, end)):
            token = {"id": top + i, "content": name, "special": name == end, "normalized": False}
            fields["added_tokens"].append({**token, "single_word": False, "lstrip": False, "rstrip": False})

    loaded = altered(tokenizer, tmp_path, add, {})
    f, r = tokenizer.encode("f"), tokenizer.encode("r")
    assert loaded.encode("für") == [*f, 1001, *r]
    assert loaded.encode("für<|EOT|>", parse_special=True) == [*f, 1001, *r, 1002]
    assert loaded.decode([*f, 1001, *r, 1002]) == "für"
    text = f"{MIXED} ü {markup}{end}<think>"
    ids = loaded.encode(text)
    assert loaded.decode(ids) == text and not {0, 1000, 1002} & set(ids)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("für", add_special_tokens=False).ids == loaded.encode("für")
    assert theirs.decode([1001]) == "\N{REPLACEMENT CHARACTER}"  # what is avoided here
