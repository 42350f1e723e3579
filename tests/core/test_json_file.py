import time

import pytest

from nautile.core.errors import UserError
from nautile.core.json_file import read_json_object, unique_json


def test_an_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"ü": [1, null]}', "utf-8")
    assert read_json_object(tmp_path / "a.json", "it matters") == {"ü": [1, None]}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'{"a": 1,\n}', "a.json:2: not JSON"),
        (b"", "a.json:1: not JSON"),
        (b'{"\xff": 1}', "byte 2 is no UTF-8"),
        (b"[1]", "holds no JSON object"),
        (b"null", "holds no JSON object"),
        (b"[" * 200_000, "not JSON"),
        (b'{"a": {"b": 1, "c": 2, "b": 1}}', "'b' is named twice"),
        (b'{"a": "\\ud83d"}', "half of a character"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_anything_else_is_refused_with_file_and_purpose(tmp_path, content, what):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_json_object(tmp_path / "a.json", "it matters", "mend it")
    assert what in raised.value.what and "it matters" in raised.value.why and raised.value.cure == "mend it"


def test_a_file_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"a\.json: cannot be read \(No such file"):
        read_json_object(tmp_path / "a.json", "it matters")


def test_whole_characters_from_two_escapes_are_read():
    assert unique_json(b'{"a": "\\ud83d\\ude00"}') == {"a": "😀"}


def test_a_key_named_twice_is_found_in_time_that_grows_with_the_file_not_with_its_square():
    """DeepSeek-V3's index has 92k entries; counting each key took 90 s."""
    text = b"{" + b"".join(b'"model.layers.%d": 1, ' % i for i in range(100_000)) + b'"model.layers.99999": 1}'
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"'model\.layers\.99999' is named twice"):
        unique_json(text)
    assert time.monotonic() - started < 10
