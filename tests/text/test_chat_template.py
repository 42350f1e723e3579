import pytest

from nautile.core.errors import UserError
from nautile.text.chat_template import ChatTemplate
from nautile.text.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some text"], 280)


def test_special_tokens_are_meant_in_templates_and_in_nothing_else(tokenizer):
    template = ChatTemplate("{{ bos_token }}{% for m in messages %}<｜User｜>{{ m.content }}{% endfor %}", tokenizer)
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    user = tokenizer.token_id("<｜User｜>")
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    assert template.encode(messages) == [tokenizer.bos_id, user, a, user, b]


def test_templates_run_in_a_sandbox_and_may_refuse(tokenizer):
    escape = ChatTemplate("{{ messages.__class__.__mro__ }}", tokenizer)
    with pytest.raises(UserError, match="refused"):
        escape.render([{"role": "user", "content": "a"}])
    strict = ChatTemplate("{{ raise_exception('roles must alternate') }}", tokenizer)
    with pytest.raises(UserError, match="roles must alternate"):
        strict.render([])
    with pytest.raises(UserError, match="does not parse"):
        ChatTemplate("{% for %}", tokenizer)


def test_templates_are_found_where_models_keep_them(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert ChatTemplate.load(tmp_path, tokenizer) is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "default", "template": "old"}]}')
    assert ChatTemplate.load(tmp_path, tokenizer).render([]) == "old"
    (tmp_path / "chat_template.jinja").write_text("new")
    assert ChatTemplate.load(tmp_path, tokenizer).render([]) == "new"
