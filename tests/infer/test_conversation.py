import pytest

from nautile.core.errors import UserError
from nautile.infer.conversation import Conversation, Turn
from nautile.infer.llm import LLM
from nautile.infer.params import SamplingParams
from nautile.text.chat_template import ChatTemplate

PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{% else %}<｜Assistant｜>{% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)


@pytest.fixture
def llm(folder):
    return LLM(folder)


def test_a_base_model_continues_the_running_text(llm, tokenizer):
    conversation = Conversation(llm, PARAMS)
    first = "".join(conversation.reply("the quick"))
    assert first == llm.generate([0, *tokenizer.encode("the quick\n")], PARAMS)[0].text
    assert conversation.turns == [Turn("user", "the quick"), Turn("assistant", first)]
    conversation.turns.append(Turn("user", "fox\n"))
    assert conversation.text() == f"the quick\n{first}\nfox\n"
    conversation.reset()
    assert conversation.turns == []


def test_a_text_longer_than_the_context_loses_its_beginning(llm, tokenizer):
    conversation = Conversation(llm, PARAMS)
    conversation.turns = [Turn("user", "abcdefghij" * 20)]
    prompt = conversation.prompt()
    assert len(prompt) == 64 - 6
    assert prompt == [0, *tokenizer.encode(conversation.text())[-57:]]
    assert "".join(conversation.reply("x"))


def test_a_template_turns_messages_into_special_tokens(llm, tokenizer):
    conversation = Conversation(llm, PARAMS, ChatTemplate(TEMPLATE, tokenizer))
    conversation.turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")]
    user, assistant = tokenizer.token_id("<｜User｜>"), tokenizer.token_id("<｜Assistant｜>")
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    assert conversation.prompt() == [0, user, a, assistant, b, user, c, assistant]


def test_old_exchanges_make_room(llm, tokenizer):
    conversation = Conversation(llm, PARAMS, ChatTemplate(TEMPLATE, tokenizer))
    conversation.turns = [Turn("user", "x" * 40), Turn("assistant", "y" * 30), Turn("user", "z")]
    assert tokenizer.decode(conversation.prompt()) == "z"


def test_a_broken_off_answer_is_remembered_and_a_refused_line_is_not(llm, tokenizer):
    conversation = Conversation(llm, PARAMS)
    pieces = conversation.reply("the")
    said = next(pieces)
    pieces.close()
    assert conversation.turns == [Turn("user", "the"), Turn("assistant", said)]
    talking = Conversation(llm, PARAMS, ChatTemplate(TEMPLATE, tokenizer))
    with pytest.raises(UserError, match="the prompt has"):
        list(talking.reply("x" * 100))
    assert talking.turns == []


def test_an_empty_answer_is_a_turn_where_sides_must_alternate(llm, tokenizer, monkeypatch):
    monkeypatch.setattr(llm, "stream", lambda prompt, params: iter(()))
    talking = Conversation(llm, PARAMS, ChatTemplate(TEMPLATE, tokenizer))
    assert list(talking.reply("a")) == [] and list(talking.reply("b")) == []
    assert [turn.role for turn in talking.turns] == ["user", "assistant"] * 2
    continuing = Conversation(llm, PARAMS)
    assert list(continuing.reply("a")) == [] and continuing.text() == "a\n"
