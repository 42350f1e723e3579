import json
from pathlib import Path

import pytest

from nautile.text.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def library_texts() -> list[str]:
    """Some real code: a few thousand lines that every Python has."""
    return [path.read_text("utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py"))]


@pytest.fixture(scope="session")
def tokenizer(library_texts) -> Tokenizer:
    return train_tokenizer([*library_texts, "中文文本 1234567\n" * 50], 1000)
