import json
import subprocess
import sys

import pytest

from nautile.cli import data, tokenizer
from nautile.core.errors import UserError


@pytest.fixture
def source(tmp_path):
    """Flags that name a small corpus."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(100):
        (folder / f"{number}.txt").write_text(f"Text number {number} is about {number * number} shells.\n" * 3, "utf-8")
    return ["--data.source", "files", "--data.paths", str(folder)]


def test_prepare_then_show(source, tmp_path, capsys):
    flags = ["prepare", *source, "--data.cache", str(tmp_path / "cache"), "--tokenizer.vocab-size", "300", "--json"]
    assert data.main(flags) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["documents"], first["reused"]) == (100, False)
    assert data.main(flags) == 0
    assert json.loads(capsys.readouterr().out)["reused"]

    assert data.main(["show", first["folder"], "--documents", "1"]) == 0
    shown = capsys.readouterr().out
    assert "300 token ids" in shown
    assert "<｜begin▁of▁sentence｜>Text number " in shown
    assert data.main(["show", first["folder"], "--split", "train", "--documents", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["documents_shown"]) == 3


def test_train_a_tokenizer_then_show_a_text(source, tmp_path, capsys):
    out = tmp_path / "tokenizer"
    flags = ["train", "--out", str(out), *source, "--tokenizer.vocab-size", "300"]
    assert tokenizer.main(flags) == 0
    assert "300 token ids" in capsys.readouterr().out
    assert tokenizer.main(["show", str(out), "42 é"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1)[1] for line in shown[:2]] == ["'4'", "'2'"]
    assert shown[-1].startswith("5 tokens of 300 ids for 5 bytes")
    with pytest.raises(UserError, match="already holds a tokenizer"):
        tokenizer.main(flags)
    with pytest.raises(UserError, match="names an existing tokenizer"):
        tokenizer.main(["train", "--out", str(tmp_path / "new"), "--tokenizer.path", str(out)])


@pytest.mark.parametrize(("verb", "near"), [(data, "prepare"), (tokenizer, "train")])
def test_actions_are_listed_and_corrected(verb, near, capsys):
    assert verb.main([]) == 0
    assert near in capsys.readouterr().out
    with pytest.raises(UserError, match=f"unknown action '{near}d'") as refused:
        verb.main([f"{near}d"])
    assert near in refused.value.cure


@pytest.mark.parametrize("words", ["data prepare", "data show", "tokenizer train", "tokenizer show"])
def test_help_shows_two_examples_without_torch(words):
    verb, action = words.split()
    script = (
        f"import sys; from nautile.cli import {verb} as verb\n"
        f"try: verb.main(['{action}', '--help'])\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown.count(f"  nautile {verb} {action}") >= 2


@pytest.mark.parametrize("flag", ["--documents=-1", "--characters=0"])
def test_impossible_amounts_are_sentences(flag, tmp_path):
    with pytest.raises(UserError, match="not possible"):
        data.main(["show", str(tmp_path), flag])
