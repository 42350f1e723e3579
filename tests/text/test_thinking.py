import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautile.text.thinking import Piece, ThinkSplitter, drop_reasoning, join, opened_by, split_thinking

turns = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</", "think", ">", "a", "b c", " ", "\n", "</thin", "<think"])
).map("".join)


@given(text=turns, inside=st.booleans(), data=st.data())
def test_the_parts_do_not_depend_on_how_the_stream_is_cut(text, inside, data):
    splitter = ThinkSplitter(inside)
    pieces, rest = [], text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces += splitter.push(rest[:size])
        rest = rest[size:]
    pieces += splitter.flush()
    assert join(pieces) == split_thinking(text, inside)
    assert all(piece.text for piece in pieces)
    thoughts = [piece.reasoning for piece in pieces]
    assert thoughts == sorted(thoughts, reverse=True)  # no thought after the answer has begun


@given(text=turns, inside=st.booleans())
def test_nothing_but_marks_and_the_space_around_them_is_lost(text, inside):
    reasoning, answer = split_thinking(text, inside)
    begun = inside or text.lstrip().startswith("<think>")
    if not begun:
        assert (reasoning, answer) == ("", text)
        return
    body = text.lstrip().removeprefix("<think>")
    thought, _, said = body.partition("</think>")
    assert (reasoning, answer) == (thought.strip(), said.lstrip())


@pytest.mark.parametrize(
    ("text", "inside", "parts"),
    [
        ("hm\n</think>\n\nfour", True, ("hm", "four")),  # opened by the template, as R1's
        ("<think>\nhm\n</think>\n\nfour", True, ("hm", "four")),  # and by the model once more
        ("<think>\nhm\n</think>\n\nfour", False, ("hm", "four")),
        ("\n<think>hm</think>four", False, ("hm", "four")),
        ("four", False, ("", "four")),
        ("  four\n", False, ("", "  four\n")),
        ("hm, hm", True, ("hm, hm", "")),  # cut off
        ("<think>\nhm </th", False, ("hm </th", "")),
        ("<think>\n\n</think>\n\nfour", False, ("", "four")),  # R1 without a thought
        ("a <think> in HTML </think>", False, ("", "a <think> in HTML </think>")),
        ("one</think>two</think>three", True, ("one", "two</think>three")),
        ("", True, ("", "")),
    ],
)
def test_marks_wherever_they_come_from(text, inside, parts):
    assert split_thinking(text, inside) == parts


def test_text_is_shown_as_soon_as_it_is_certain():
    splitter = ThinkSplitter(inside=True)
    assert splitter.push("\nso ") == [Piece("so", reasoning=True)]
    assert splitter.push("be it </") == [Piece(" be it", reasoning=True)]
    assert splitter.push("b> then") == [Piece(" </b> then", reasoning=True)]
    assert splitter.push("\n</think>\n") == []
    assert splitter.push("\nyes ") == [Piece("yes ")]
    assert splitter.push("no ") == [Piece("no ")]
    assert splitter.flush() == []


def test_prompts_that_open_the_reasoning():
    assert opened_by("<｜Assistant｜><think>\n") and opened_by("<｜Assistant｜><think>")
    assert not opened_by("<｜Assistant｜></think>") and not opened_by("<｜Assistant｜>")


def test_past_reasoning_is_dropped_up_to_its_last_mark():
    assert drop_reasoning("<think>a</think>\n\nb") == "\n\nb"
    assert drop_reasoning("a</think>b</think>c") == "c"
    assert drop_reasoning("plain") == "plain"
