import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautile.core.errors import UserError
from nautile.data.config import DataConfig
from nautile.data.corpus import Corpus, thin
from nautile.data.sources.document import Document

SENTENCES = [f"Sentence number {number} of the corpus.\n" * (1 + number % 5) for number in range(1000)]


class Texts:
    """A source of given texts."""

    def __init__(self, texts):
        self.texts = texts

    def documents(self, skipped):
        return (Document(f"text {number}", text) for number, text in enumerate(self.texts))

    def inventory(self):
        return [str(hash(tuple(self.texts)))]


def corpus(texts, **config):
    return Corpus(DataConfig(**config), Texts(texts))


def sides(corpus):
    split = {True: set(), False: set()}
    for entry in corpus:
        split[corpus.holds_out(entry)].add(entry.document.text)
    return split


def test_split_has_the_asked_share_and_stays_when_the_corpus_grows():
    small, large = sides(corpus(SENTENCES[:500])), sides(corpus(SENTENCES[::-1]))
    assert 30 <= len(large[True]) <= 70  # 50 expected of 1,000
    assert large[True] & set(SENTENCES[:500]) == small[True]
    assert len(large[True]) + len(large[False]) == len(SENTENCES)


def test_only_the_document_placed_by_hand_changes_sides_when_a_more_extreme_one_arrives():
    lowest, *rest = [e.document.text for e in sorted(corpus(SENTENCES[:50]), key=lambda entry: entry.position)]
    # The least fraction that leaves 49 documents whole.
    small, large = (sides(corpus(texts, validation_fraction=1 / 49)) for texts in (rest, [lowest, *rest]))
    assert small[True] == {rest[0]} and large[True] == {lowest}


def test_equal_texts_are_used_once_and_white_space_never():
    texts = [*SENTENCES[:100], "  \n", "", *SENTENCES[50:150], SENTENCES[0]]
    built = corpus(texts)
    used = [entry.document.text for entry in built]
    assert used == SENTENCES[:150]
    survey = built.survey
    assert (survey.documents, survey.duplicates, survey.empty) == (150, 51, 2)
    assert survey.num_bytes == sum(map(len, used))


def test_max_megabytes_draws_evenly():
    whole = corpus(SENTENCES).survey
    part = corpus(SENTENCES, max_megabytes=whole.num_bytes / 4e6)
    used = [SENTENCES.index(entry.document.text) for entry in part]
    assert part.survey.num_bytes == pytest.approx(whole.num_bytes / 4, rel=0.05)
    assert len(used) == 250
    assert 100 < sum(number < 500 for number in used) < 150


@given(share=st.floats(0.001, 1), length=st.integers(1, 300))
def test_thinning_takes_its_share_of_every_beginning(share, length):
    taken = list(thin(range(length), share))
    assert taken[0] == 0
    for end in range(1, length + 1):
        assert abs(sum(item < end for item in taken) - share * end) <= 1


@pytest.mark.parametrize("fraction", [0.0001, 0.5, 0.9999])
@pytest.mark.parametrize("count", [2, 3])
def test_both_sides_have_a_document(count, fraction):
    for start in range(0, 60, count):
        split = sides(corpus(SENTENCES[start : start + count], validation_fraction=fraction))
        assert split[True]
        assert split[False]


def test_one_long_document_is_cut_into_parts(capsys):
    text = "".join(f"line {number} of a single long file\n" for number in range(20_000))
    built = corpus([text])
    parts = [entry.document for entry in built]
    assert "".join(part.text for part in parts) == text
    assert all(part.text.endswith("\n") for part in parts)
    assert [part.name for part in parts][:2] == ["text 0#0", "text 0#1"]
    assert 150 < len(parts) < 250
    assert 1 <= len(sides(built)[True]) < 30
    assert "1 documents are too few" in capsys.readouterr().err


def test_enough_documents_are_left_whole():
    assert [entry.document.text for entry in corpus(SENTENCES[:20], validation_fraction=0.05)] == SENTENCES[:20]


@pytest.mark.parametrize("texts", [[], ["   "], ["one short text"], ["twice", "twice"]])
def test_too_little_text_is_a_sentence(texts):
    with pytest.raises(UserError, match="the corpus holds") as refused:
        corpus(texts)
    assert "data.paths" in refused.value.cure


def test_the_tokenizer_learns_from_training_text_only():
    built = corpus(SENTENCES)
    assert set(built.training_texts(100)) == sides(built)[False]
    drawn = list(built.training_texts(built.survey.num_bytes / 10e6))
    assert sum(map(len, drawn)) == pytest.approx(built.survey.num_bytes / 10, rel=0.1)
    assert set(drawn) < sides(built)[False]
    assert len(list(corpus(["x" * 10**6, "y"]).training_texts(1e-6))) == 1
