import pytest

from nautile.core.errors import UserError
from nautile.core.json_file import read_json_object


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
    ],
)
def test_anything_else_is_refused_with_file_and_purpose(tmp_path, content, what):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_json_object(tmp_path / "a.json", "it matters", "mend it")
    assert what in raised.value.what and "it matters" in raised.value.why and raised.value.cure == "mend it"
