from hypothesis import given
from hypothesis import strategies as st

from nautile.text.stream import IncrementalDecoder


@given(ids=st.lists(st.integers(0, 999)), skip=st.booleans())
def test_pieces_join_to_the_whole(tokenizer, ids, skip):
    decoder = IncrementalDecoder(tokenizer, skip)
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids, skip)


@given(text=st.text())
def test_real_text_never_shows_half_a_character(tokenizer, text):
    decoder = IncrementalDecoder(tokenizer)
    shown = ""
    for token in tokenizer.encode(text):
        shown += decoder.push(token)
        assert text.startswith(shown)
    assert shown == text
    assert decoder.flush() == ""


def test_an_unfinished_character_is_told_once(tokenizer):
    decoder = IncrementalDecoder(tokenizer)
    first, *_ = tokenizer.encode("😀")
    assert decoder.push(first) == ""
    assert decoder.flush() == "�"
    assert decoder.flush() == ""
    assert "".join(map(decoder.push, tokenizer.encode("ok"))) == "ok"
