import json

import pytest

from nautile.core.errors import UserError
from nautile.core.extras import require


def test_an_installed_module_is_returned():
    assert require("json", "data") is json


@pytest.mark.parametrize("module", ["no_such_library", "no_such_library.part", "json.no_such_part"])
def test_a_missing_module_says_what_to_type(module):
    with pytest.raises(UserError) as caught:
        require(module, "data")
    assert caught.value.what == f"{module} is not installed"
    assert caught.value.cure == "python -m pip install 'nautile[data]'"


def test_an_installed_module_with_a_missing_dependency_says_so(tmp_path, monkeypatch):
    (tmp_path / "broken_library.py").write_text("import a_dependency_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_dependency_that_is_not_there"):
        require("broken_library", "data")
