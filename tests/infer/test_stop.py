from hypothesis import given
from hypothesis import strategies as st

from nautile.infer.stop import StopStrings

text_of_few_letters = st.text(alphabet="ab\n", max_size=30)


@given(text_of_few_letters, st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3), st.data())
def test_pieces_join_to_the_text_before_the_first_stop_string(text, strings, data):
    stop = StopStrings(strings)
    shown, rest = "", text
    while rest and stop.found is None:
        size = data.draw(st.integers(1, len(rest)))
        shown += stop.push(rest[:size])
        rest = rest[size:]
        assert not any(string in shown for string in strings)
    if stop.found is None:
        assert shown + stop.flush() == text
    else:
        assert text.startswith(shown + stop.found)


def test_a_stop_string_split_over_pieces_is_never_shown():
    stop = StopStrings(["\n\nclass"])
    assert [stop.push(piece) for piece in ["x = 1\n", "\n", "cl", "ass A:"]] == ["x = 1", "", "", ""]
    assert stop.found == "\n\nclass"
    assert stop.push("more") == "" and stop.flush() == ""


def test_a_false_beginning_is_let_go():
    stop = StopStrings(["abc"])
    assert stop.push("ab") == ""
    assert stop.push("ab") == "ab"
    assert stop.push("d") == "abd"


def test_nothing_is_held_without_stop_strings():
    assert StopStrings([]).push("anything") == "anything"
