import pytest

from nautile.core.nearest import nearest, suggestion


@pytest.mark.parametrize(
    ("name", "found"),
    [("lerning_rate", "learning_rate"), ("Learning-Rate", "learning_rate"), ("bta", "beta"), ("xyz", None)],
)
def test_nearest(name, found):
    assert nearest(name, ["learning_rate", "beta", "seed"]) == found


def test_without_a_near_name_all_are_listed():
    assert suggestion("sede", ["seed", "name"], "keys") == "did you mean 'seed'?"
    assert suggestion("xyz", ["seed", "name"], "keys") == "the keys are: seed, name"
