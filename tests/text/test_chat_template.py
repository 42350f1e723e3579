import json

import pytest

from nautile.core.errors import UserError
from nautile.text.chat_template import BuiltInTemplate, ProgramTemplate, encode, find_template
from nautile.text.tokenizer import Tokenizer, train_tokenizer

HELLO = [{"role": "user", "content": "a"}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some text"], 280)


def test_special_tokens_are_meant_in_templates_and_in_nothing_else(tokenizer):
    template = ProgramTemplate("{{ bos_token }}{% for m in messages %}<｜User｜>{{ m.content }}{% endfor %}", tokenizer)
    text = template.render([*HELLO, {"role": "user", "content": "b"}])
    user = tokenizer.token_id("<｜User｜>")
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    assert encode(tokenizer, text) == [tokenizer.bos_id, user, a, user, b]


def test_templates_run_in_a_sandbox_and_may_refuse(tokenizer):
    escape = ProgramTemplate("{{ messages.__class__.__mro__ }}", tokenizer)
    with pytest.raises(UserError, match="refused"):
        escape.render(HELLO)
    strict = ProgramTemplate("{{ raise_exception('roles must alternate') }}", tokenizer)
    with pytest.raises(UserError, match="roles must alternate"):
        strict.render([])
    with pytest.raises(UserError, match="refused the messages"):
        ProgramTemplate("{{ 'User: ' + messages[0].content }}", tokenizer).render([{"role": "user", "content": None}])
    with pytest.raises(UserError, match="does not parse"):
        ProgramTemplate("{% for %}", tokenizer)


def test_programs_that_ask_get_thinking_and_tools(tokenizer):
    deepseek = "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ thinking }}"
    assert [ProgramTemplate(deepseek, tokenizer).render(HELLO, thinking=t) for t in (None, True, False)] == [
        "False",
        "True",
        "False",
    ]
    qwen = ProgramTemplate("{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}", tokenizer)
    assert [qwen.render(HELLO, thinking=t) for t in (None, True)] == ["", "True"]
    silent = ProgramTemplate("{{ messages[0].content }}", tokenizer)
    with pytest.raises(UserError, match="only one way"):
        silent.render(HELLO, thinking=False)
    with pytest.raises(UserError, match="no place for tools"):
        silent.render(HELLO, tools=[{}])
    tools = ProgramTemplate("{% if tools is not none %}{{ tools | tojson }}{% endif %}", tokenizer)
    assert tools.render(HELLO) == ""
    assert tools.render(HELLO, tools=[{"name": "<é>"}]) == '[{"name": "<é>"}]'  # no HTML escapes
    compact = ProgramTemplate("{{ tools | tojson(separators=(',', ':'), sort_keys=true) }}", tokenizer)
    assert compact.render(HELLO, tools=[{"b": 1, "a": 2}]) == '[{"a":2,"b":1}]'


def test_training_marks_pass_their_body_through(tokenizer):
    program = "{% for m in messages %}{% generation %}{% set x = m.content %}[{{ x }}]{% endgeneration %}{% endfor %}"
    assert ProgramTemplate(program, tokenizer).render([*HELLO, *HELLO]) == "[a][a]"
    asking = ProgramTemplate("{% generation %}{{ thinking }}{% endgeneration %}", tokenizer)
    assert asking.render(HELLO, thinking=True) == "True"
    with pytest.raises(UserError, match="does not parse"):
        ProgramTemplate("{% generation %}a", tokenizer)


def test_programs_get_parts_of_text_as_one_text(tokenizer):
    program = ProgramTemplate("{{ '<' + messages[0].content + '>' + messages[0].name }}", tokenizer)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert program.render([{"role": "user", "content": parts, "name": "n"}]) == "<a\nb>n"
    with pytest.raises(UserError, match="part of type 'image_url'"):
        program.render([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])


def test_a_broken_config_beside_the_tokenizer_is_named(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"config\.json:1: not JSON"):
        find_template(tmp_path, Tokenizer.load(tmp_path))


def test_templates_are_found_where_models_keep_them(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert find_template(tmp_path, Tokenizer.load(tmp_path)) is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "default", "template": "old"}]}')
    assert find_template(tmp_path, Tokenizer.load(tmp_path)).render([]) == "old"
    (tmp_path / "chat_template.jinja").write_text("new")
    assert find_template(tmp_path, Tokenizer.load(tmp_path)).render([]) == "new"


def test_the_models_own_template_goes_before_the_built_in_one(tokenizer, tmp_path):
    folder = tmp_path / "DeepSeek-R1"
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    found = find_template(folder, Tokenizer.load(folder))
    assert isinstance(found, BuiltInTemplate) and found.render(HELLO).endswith("<think>\n")
    assert found.origin == "the built-in chat template r1 (the folder is called DeepSeek-R1)"
    (folder / "chat_template.jinja").write_text("own")
    assert find_template(folder, Tokenizer.load(folder)).render(HELLO) == "own"
    forced = find_template(folder, Tokenizer.load(folder), "v2")
    assert forced.render(HELLO) == "<｜begin▁of▁sentence｜>User: a\n\nAssistant:"
    with pytest.raises(UserError, match="did you mean 'v2'"):
        find_template(folder, Tokenizer.load(folder), "v_2")


def test_a_formats_own_end_token_ends_answers(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text("utf-8").replace("<｜▁pad▁｜>", "<|EOT|>"), "utf-8")
    coder = find_template(tmp_path, Tokenizer.load(tmp_path), "coder")
    assert coder.end_ids == {2}
    assert find_template(tmp_path, Tokenizer.load(tmp_path), "v3").end_ids == frozenset()
