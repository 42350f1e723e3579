import pytest

from nautile.core.errors import UserError
from nautile.infer.conversation import Conversation, Turn
from nautile.infer.llm import LLM
from nautile.infer.params import SamplingParams
from nautile.text.chat_template import BuiltInTemplate, ProgramTemplate
from nautile.text.thinking import Piece

PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{% else %}<｜Assistant｜>{% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)


@pytest.fixture
def llm(folder):
    return LLM(folder)


@pytest.fixture
def talker(llm, tokenizer):
    """The same model with a chat template."""
    llm.template = ProgramTemplate(TEMPLATE, tokenizer)
    return llm


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def test_a_base_model_continues_the_running_text(llm, tokenizer):
    conversation = Conversation(llm, PARAMS)
    first = text_of(conversation.reply("the quick"))
    assert first == llm.generate([0, *tokenizer.encode("the quick\n")], PARAMS)[0].text
    assert conversation.turns == [Turn("user", "the quick"), Turn("assistant", first)]
    conversation.turns.append(Turn("user", "fox\n"))
    assert conversation.text() == f"the quick\n{first}\nfox\n"
    conversation.reset()
    assert conversation.turns == []


def test_a_text_longer_than_the_context_loses_its_beginning(llm, tokenizer):
    conversation = Conversation(llm, PARAMS)
    conversation.turns = [Turn("user", "abcdefghij" * 20)]
    prompt = conversation.prompt().ids
    assert len(prompt) == 64 - 6
    assert prompt == [0, *tokenizer.encode(conversation.text())[-57:]]
    assert text_of(conversation.reply("x"))


def test_a_template_turns_messages_into_special_tokens(talker, tokenizer):
    conversation = Conversation(talker, PARAMS)
    conversation.turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")]
    user, assistant = tokenizer.token_id("<｜User｜>"), tokenizer.token_id("<｜Assistant｜>")
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    assert conversation.prompt().ids == [0, user, a, assistant, b, user, c, assistant]


def test_old_exchanges_make_room(talker, tokenizer):
    conversation = Conversation(talker, PARAMS)
    conversation.turns = [Turn("user", "x" * 40), Turn("assistant", "y" * 30), Turn("user", "z")]
    assert tokenizer.decode(conversation.prompt().ids) == "z"


def test_a_broken_off_answer_is_remembered_and_a_refused_line_is_not(llm, tokenizer):
    conversation = Conversation(llm, PARAMS)
    pieces = conversation.reply("the")
    said = next(pieces)
    pieces.close()
    assert conversation.turns == [Turn("user", "the"), Turn("assistant", said.text)]
    llm.template = ProgramTemplate(TEMPLATE, tokenizer)
    talking = Conversation(llm, PARAMS)
    with pytest.raises(UserError, match="the prompt has"):
        list(talking.reply("x" * 100))
    assert talking.turns == []


def test_an_empty_answer_is_a_turn_where_sides_must_alternate(llm, tokenizer, monkeypatch):
    monkeypatch.setattr(llm, "stream", lambda prompt, params: iter(()))
    continuing = Conversation(llm, PARAMS)
    assert list(continuing.reply("a")) == [] and continuing.text() == "a\n"
    llm.template = ProgramTemplate(TEMPLATE, tokenizer)
    talking = Conversation(llm, PARAMS)
    assert list(talking.reply("a")) == [] and list(talking.reply("b")) == []
    assert [turn.role for turn in talking.turns] == ["user", "assistant"] * 2


def scripted(llm, monkeypatch, *texts):
    monkeypatch.setattr(llm, "stream", lambda prompt, params: iter(texts))


def test_only_the_answer_is_remembered_of_a_turn_with_reasoning(llm, tokenizer, monkeypatch):
    llm.template = BuiltInTemplate("r1", tokenizer, "a test")
    scripted(llm, monkeypatch, "so", " it is\n</th", "ink>\n\nfo", "ur")
    conversation = Conversation(llm, PARAMS)
    assert list(conversation.reply("2+2?")) == [
        Piece("so", reasoning=True),
        Piece(" it is", reasoning=True),
        Piece("fo"),
        Piece("ur"),
    ]
    assert conversation.turns == [Turn("user", "2+2?"), Turn("assistant", "four")]


def test_a_turn_that_ends_while_reasoning(llm, tokenizer, monkeypatch):
    llm.template = BuiltInTemplate("r1", tokenizer, "a test")
    scripted(llm, monkeypatch, "so", " it is")
    conversation = Conversation(llm, PARAMS)
    list(conversation.reply("2+2?"))  # by its length: an empty answer
    assert conversation.turns == [Turn("user", "2+2?"), Turn("assistant", "")]
    conversation.reset()
    pieces = conversation.reply("2+2?")  # by Ctrl-C: nothing was said
    next(pieces)
    pieces.close()
    assert conversation.turns == []


def test_a_base_models_marks_are_text(llm, monkeypatch):
    scripted(llm, monkeypatch, "<think>", "a</think> b")
    conversation = Conversation(llm, PARAMS)
    assert text_of(conversation.reply("x")) == "<think>a</think> b"
    assert conversation.text() == "x\n<think>a</think> b\n"


def test_ways_of_answering_are_asked_of_the_template(llm, tokenizer):
    llm.template = BuiltInTemplate("v3.1", tokenizer, "a test")
    ends = {True: "<think>", False: "</think>", None: "</think>"}
    for thinking, end in ends.items():
        conversation = Conversation(llm, PARAMS, thinking)
        conversation.turns = [Turn("user", "a")]
        prompt = conversation.prompt()
        assert tokenizer.decode(prompt.ids).endswith(end) and prompt.thinking is (thinking is True)
