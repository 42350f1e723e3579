import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautile.core.errors import UserError
from nautile.text import fim
from nautile.text.spans import spans
from nautile.text.tokenizer import Tokenizer


@given(text=st.text(), key=st.text())
def test_a_cut_loses_nothing_and_is_repeatable(text, key):
    parts = fim.cut(text, key)
    assert parts.prefix + parts.middle + parts.suffix == text
    assert fim.cut(text, key) == parts


def test_cuts_are_spread_over_the_text():
    cuts = [fim.cut("x" * 999, str(key)) for key in range(2000)]
    for name in ("prefix", "middle", "suffix"):  # two uniform places: each part is a third on average
        assert 300 < sum(len(getattr(cut, name)) for cut in cuts) / len(cuts) < 366


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_rate_is_the_share_chosen(rate):
    share = sum(fim.chosen(f"0 {key}", rate) for key in range(4000)) / 4000
    assert share == pytest.approx(rate, abs=0.02)


def test_psm_order(tokenizer):
    prefix, middle, suffix = (tokenizer.encode(text) for text in ("def f(", "x", "): return x"))
    ids = fim.to_psm(prefix, middle, suffix, tokenizer)
    assert tokenizer.decode(ids, False) == "<｜fim▁begin｜>def f(<｜fim▁hole｜>): return x<｜fim▁end｜>x"
    assert ids == [*fim.psm_prompt(prefix, suffix, tokenizer), *middle]


def test_a_tokenizer_without_gap_tokens_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    fields = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(fields, ensure_ascii=False).replace("fim▁hole", "other"), "utf-8")
    with pytest.raises(UserError, match="no fill-in-the-middle tokens"):
        fim.psm_prompt([], [], Tokenizer.load(tmp_path))


@given(text=st.text(alphabet="ab\n"), longest=st.integers(1, 9))
def test_spans_are_the_text_in_bounded_parts(text, longest):
    parts = spans(text, longest)
    assert "".join(parts) == text
    assert all(0 < len(part) <= longest for part in parts)
    for part, following in zip(parts, parts[1:], strict=False):
        assert part.endswith("\n") or "\n" not in part, (part, following)
