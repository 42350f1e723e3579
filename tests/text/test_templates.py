"""Built-in formats against texts written out by hand from the published ones."""

import json

import pytest

from nautile.core.errors import UserError
from nautile.text.chat_template import BuiltInTemplate
from nautile.text.templates import coder, v31, v32
from nautile.text.templates.choose import choose, title_of
from nautile.text.templates.table import FORMATS

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
U, A = "<｜User｜>", "<｜Assistant｜>"
ONE = [{"role": "user", "content": "1+1?"}]
THREE = [
    {"role": "system", "content": "Be brief."},
    *ONE,
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\n2"},
    {"role": "user", "content": "And 2+2?"},
]
PLAIN = [*THREE[:2], {"role": "assistant", "content": "2"}, THREE[3]]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather at a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}


CALLED = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "Two places.",
        "tool_calls": [call("weather", place="Köln", days=[1, 2]), call("weather", place="Ulm")],
    },
    {"role": "tool", "content": "sun"},
    {"role": "tool", "content": "rain"},
]


def render(name, tokenizer, messages, **how):
    return BuiltInTemplate(name, tokenizer, "asked for").render(messages, **how)


@pytest.mark.parametrize(
    ("name", "messages", "text"),
    [
        ("v2", ONE, f"{BOS}User: 1+1?\n\nAssistant:"),
        ("v2", PLAIN, f"{BOS}Be brief.\n\nUser: 1+1?\n\nAssistant: 2{EOS}User: And 2+2?\n\nAssistant:"),
        ("v2.5", PLAIN, f"{BOS}Be brief.{U}1+1?{A}2{EOS}{U}And 2+2?{A}"),
        ("v3", ONE, f"{BOS}{U}1+1?{A}"),
        ("v3", THREE, f"{BOS}Be brief.{U}1+1?{A}\n\n2{EOS}{U}And 2+2?{A}"),
        ("r1", ONE, f"{BOS}{U}1+1?{A}<think>\n"),
        (
            "r1",
            THREE,
            f"{BOS}Be brief.{U}1+1?{A}\n\n2{EOS}{U}And 2+2?{A}<think>\n",
        ),
        ("r1-0528", ONE, f"{BOS}{U}1+1?{A}"),
        ("v3.1", ONE, f"{BOS}{U}1+1?{A}</think>"),
        (
            "v3.1",
            THREE,
            f"{BOS}Be brief.{U}1+1?{A}</think>\n\n2{EOS}{U}And 2+2?{A}</think>",
        ),
        ("v3.2", ONE, f"{BOS}{U}1+1?{A}</think>"),
        (
            "v3.2",
            PLAIN,
            f"{BOS}Be brief.{U}1+1?{A}</think>2{EOS}{U}And 2+2?{A}</think>",
        ),
        ("coder", ONE, f"{BOS}{coder.SYSTEM}### Instruction:\n1+1?\n### Response:\n"),
        (
            "coder",
            PLAIN,
            f"{BOS}Be brief.### Instruction:\n1+1?\n### Response:\n2\n<|EOT|>\n"
            "### Instruction:\nAnd 2+2?\n### Response:\n",
        ),
    ],
)
def test_texts(tokenizer, name, messages, text):
    assert render(name, tokenizer, messages) == text


def test_thinking_where_a_format_has_both_ways(tokenizer):
    begin = f"{BOS}Be brief.{U}1+1?{A}</think>2{EOS}{U}And 2+2?{A}"
    for name in ("v3.1", "v3.2"):
        assert render(name, tokenizer, PLAIN, thinking=True) == begin + "<think>"
        assert render(name, tokenizer, PLAIN, thinking=False) == begin + "</think>"
        assert render(name, tokenizer, PLAIN) == begin + "</think>"
    for name in FORMATS.keys() - {"v3.1", "v3.2"}:
        with pytest.raises(UserError, match="only one way of answering"):
            render(name, tokenizer, ONE, thinking=True)


def test_v3_tools(tokenizer):
    text = (
        f"{BOS}{U}Weather?{A}I look.<｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"place": "Köln", "days": [1, 2]}\n```'
        '<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"place": "Ulm"}\n```'
        f"<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}<｜tool▁outputs▁begin｜>"
        "<｜tool▁output▁begin｜>sun<｜tool▁output▁end｜><｜tool▁output▁begin｜>rain<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )
    assert render("v3", tokenizer, CALLED) == text
    answered = [*CALLED, {"role": "assistant", "content": "Sun, rain."}, *ONE]
    assert render("v3", tokenizer, answered) == f"{text}Sun, rain.{EOS}{U}1+1?{A}"
    # A system message goes to the front and parts no round of tools; an answer to a result is not cut.
    between, thought = {"role": "system", "content": "S"}, {"role": "assistant", "content": "<think>r</think>Sun."}
    moved = text.replace(BOS, BOS + "S")
    assert render("v3", tokenizer, [*CALLED[:3], between, CALLED[3]]) == moved
    assert render("v3", tokenizer, [*CALLED, between]) == moved
    assert render("v3", tokenizer, [*CALLED, between, thought]) == f"{moved}<think>r</think>Sun.{EOS}{A}"
    again = render("v3", tokenizer, [*answered, *CALLED[1:]])  # the second round looks like the first
    assert again.endswith(text.partition(f"{U}Weather?")[2])
    with pytest.raises(UserError, match="no place for descriptions of tools"):
        render("v3", tokenizer, ONE, tools=[WEATHER])


def test_v31_tools(tokenizer):
    described = (
        "\n\n## Tools\nYou have access to the following tools:\n\n### weather\nDescription: Weather at a place\n\n"
        'Parameters: {"type": "object", "properties": {"place": {"type": "string"}}}\n' + v31.RULES
    )
    assert (
        "call_end" not in v31.RULES and "<｜tool▁call▁end｜>{{additional_tool_calls}}<｜tool▁calls▁end｜>" in v31.RULES
    )
    assert render("v3.1", tokenizer, CALLED, tools=[WEATHER]) == (
        f"{BOS}{described}{U}Weather?{A}</think>I look.<｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"place": "Köln", "days": [1, 2]}<｜tool▁call▁end｜>'
        f'<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{{"place": "Ulm"}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}'
        "<｜tool▁output▁begin｜>sun<｜tool▁output▁end｜><｜tool▁output▁begin｜>rain<｜tool▁output▁end｜>"
    )


def test_v31_opens_an_answer_to_a_question_and_to_nothing_else(tokenizer):
    """Word for word what the published program writes; system messages go to the front and change nothing else."""
    question, again = ONE[0], {"role": "user", "content": "And?"}
    between, answer = {"role": "system", "content": "S"}, {"role": "assistant", "content": "<think>r</think>2"}
    tool = {"role": "tool", "content": "sun"}
    asked = {"role": "assistant", "content": None, "tool_calls": [call("weather")]}
    called = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    result = "<｜tool▁output▁begin｜>sun<｜tool▁output▁end｜>"
    cases = [
        ([question, between, answer, again], f"S{U}1+1?{A}</think>2{EOS}{U}And?{A}<think>"),
        ([question, between], f"S{U}1+1?{A}<think>"),
        ([question, answer, between], f"S{U}1+1?{A}</think>2{EOS}"),
        ([between], "S"),
        ([question, between, asked, tool], f"S{U}1+1?{A}</think>{called}{EOS}{result}"),
        ([question, asked, tool, between], f"S{U}1+1?{A}</think>{called}{EOS}{result}"),
        # Behind a tool's result the answer stays whole; the next one is cut again.
        ([question, asked, tool, between, answer, answer],
         f"S{U}1+1?{A}</think>{called}{EOS}{result}<think>r</think>2{EOS}2{EOS}"),
    ]  # fmt: skip
    for messages, text in cases:
        assert render("v3.1", tokenizer, messages, thinking=True) == BOS + text


def test_parts_of_text_are_one_text(tokenizer):
    parts = [{"type": "text", "text": "1+"}, "1?"]
    assert render("v3", tokenizer, [{"role": "user", "content": parts}]) == f"{BOS}{U}1+\n1?{A}"


def test_v32_tools_and_reasoning_since_the_question(tokenizer):
    tools = v32.TOOLS.replace("%s", json.dumps(WEATHER["function"], ensure_ascii=False))
    calls = (
        "\n\n<｜DSML｜function_calls>\n"
        '<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="place" string="true">Köln</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">[1, 2]</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="place" string="true">Ulm</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
    )
    results = "\n\n<function_results>\n<result>sun</result>\n<result>rain</result>\n</function_results>\n\n"
    assert render("v3.2", tokenizer, CALLED, tools=[WEATHER], thinking=True) == (
        f"{BOS}\n\n{tools}{U}Weather?{A}<think>Two places.</think>I look.{calls}{EOS}{results}<think>"
    )
    # A new question ends the time for which reasoning is kept.
    answer = {"role": "assistant", "content": "Sun.", "reasoning_content": "Both known."}
    assert render("v3.2", tokenizer, [*CALLED, answer, *ONE], thinking=True) == (
        f"{BOS}{U}Weather?{A}</think>I look.{calls}{EOS}{results}</think>Sun.{EOS}{U}1+1?{A}<think>"
    )
    with pytest.raises(UserError, match="follows no call of a tool"):
        render("v3.2", tokenizer, [*CALLED, CALLED[-1]])
    with pytest.raises(UserError, match="no reasoning_content"):
        render("v3.2", tokenizer, [*ONE, {"role": "assistant", "content": "2"}], thinking=True)


def test_what_a_format_has_no_place_for_is_refused(tokenizer):
    for name in ("v2", "coder"):
        for messages, tools in ((ONE, [WEATHER]), (CALLED, [])):
            with pytest.raises(UserError, match="no place for tools"):
                render(name, tokenizer, messages, tools=tools)
    with pytest.raises(UserError, match="'user'"):
        render("v3", tokenizer, [{"role": "usr", "content": "a"}])
    with pytest.raises(UserError, match="a user message has a part of type 'image'"):
        render("v3", tokenizer, [{"role": "user", "content": [{"type": "image"}]}])
    with pytest.raises(UserError, match="has a part of type int"):
        render("v3", tokenizer, [{"role": "user", "content": [3]}])
    with pytest.raises(UserError, match="the content of a user message is a dict"):
        render("v3", tokenizer, [{"role": "user", "content": {"type": "text", "text": "a"}}])
    with pytest.raises(UserError, match=r"did you mean 'v3\.1'"):
        render("v31", tokenizer, ONE)


def ids(**known):
    return lambda token: known.get(token.strip("<｜>"))


V3_TOKENS = ids(User=128803, Assistant=128804)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("DeepSeek-R1", "r1"),
        ("DeepSeek-R1-0528", "r1-0528"),
        ("DeepSeek-R1-Zero", None),
        ("DeepSeek-R1-Distill-Llama-8B", "r1"),
        ("DeepSeek-V3", "v3"),
        ("DeepSeek-V3-0324", "v3"),
        ("DeepSeek-V3-Base", None),
        ("DeepSeek-V3.1-Terminus", "v3.1"),
        ("DeepSeek-V3.1-Base", None),
        ("DeepSeek-V3.2-Exp", "v3.1"),
        ("DeepSeek-V3.2", "v3.2"),
        ("DeepSeek-V2.5", "v2.5"),
        ("DeepSeek-V2-Lite-Chat", "v2"),
        ("DeepSeek-V2-Lite", None),
        ("DeepSeek-Coder-V2-Lite-Instruct", "v2"),
        ("deepseek-coder-6.7b-instruct", "coder"),
        ("deepseek-coder-7b-instruct-v1.5", "coder"),
        ("deepseek-coder-6.7b-base", None),
        ("deepseek-moe-16b-chat", "v2"),
        ("deepseek-llm-7b-chat", "v2"),
        ("my-v3.1-instruct", None),
        ("DeepSeek-V2-Chat-0628", "v2.5"),
        ("DeepSeek-V2-Chat", "v2"),
        ("deepseek-math-7b-instruct", "v2"),
        ("deepseek-math-7b-rl", "v2"),
        ("deepseek-math-7b-base", None),
        ("DeepSeek-V3_bf16", "v3"),
        ("DeepSeek-V3-bf16", "v3"),
        ("DeepSeek-V3-FP8", "v3"),
        ("DeepSeek-V3-Base_bf16", None),
        ("deepseek-math-7b-rl-AWQ", "v2"),
        ("DeepSeek-V2.5-1210-FP8", "v2.5"),
        ("DeepSeek-V3-0324_fp8-awq", "v3"),
        ("deepseek_v3_nano", None),
    ],
)
def test_the_folders_name_tells(tmp_path, folder, name):
    choice = choose(tmp_path / folder, {}, ids(), EOS)
    assert choice.name == name
    assert choice.name is None or folder in choice.reason


@pytest.mark.parametrize(
    ("published", "tokens", "eos", "name"),
    [
        ({"model_type": "deepseek_v3"}, V3_TOKENS, EOS, "v3"),
        ({"model_type": "deepseek_v3", "quantization_config": {"scale_fmt": "ue8m0"}}, V3_TOKENS, EOS, "v3.1"),
        ({"model_type": "deepseek_v32"}, V3_TOKENS, EOS, "v3.2"),
        ({"model_type": "deepseek_v3"}, ids(User=6, Assistant=7), EOS, None),  # a base model trained here
        ({"model_type": "qwen2"}, ids(User=151644, Assistant=151645), EOS, "r1"),
        ({"model_type": "llama"}, ids(User=128011, Assistant=128012), EOS, "r1"),
        ({"model_type": "qwen2"}, ids(User=6, Assistant=7), EOS, None),  # trained with a tokenizer of ours
        ({"model_type": "llama"}, ids(User=6, Assistant=7), EOS, None),
        ({"model_type": "llama"}, ids(User=151644, Assistant=151645), EOS, None),
        ({"model_type": "llama"}, ids(), "<|EOT|>", "coder"),
        ({"model_type": "llama"}, ids(), EOS, None),
        ({"model_type": "deepseek_v2"}, ids(), EOS, None),
        ({}, ids(), EOS, None),
    ],
)
def test_without_a_telling_name_the_tokens_do(tmp_path, published, tokens, eos, name):
    assert choose(tmp_path / "weights", published, tokens, eos).name == name


def test_folders_are_named_by_what_they_hold(tmp_path):
    assert title_of(tmp_path / "runs/demo/model") == "demo"
    cached = tmp_path / "models--deepseek-ai--DeepSeek-R1/snapshots/0123abcd"
    assert title_of(cached) == "DeepSeek-R1"
