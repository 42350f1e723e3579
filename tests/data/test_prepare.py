import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nautile.core.errors import NautileError, UserError
from nautile.data import prepare as prepare_module
from nautile.data.config import DataConfig
from nautile.data.prepare import PreparedData, prepare
from nautile.text.config import TokenizerConfig
from nautile.text.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE

SMALL = TokenizerConfig(vocab_size=400)


@pytest.fixture
def texts(tmp_path):
    """300 documents, with characters of two to four bytes."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(300):
        lines = [f"def größe_{number}_{line}(x):\n    return '文{line} 🐚'\n" for line in range(number % 7 + 1)]
        (folder / f"{number:03}.py").write_text("".join(lines), "utf-8")
    return folder


@pytest.fixture
def config(texts, tmp_path):
    return DataConfig(source="files", paths=(str(texts),), cache=str(tmp_path / "cache"), fim_rate=0.0)


def decoded(prepared, shards, special=False):
    documents = range(len(shards.document_starts))
    return [prepared.tokenizer.decode(shards.document(index), not special) for index in documents]


def originals(texts):
    return sorted(file.read_text("utf-8") for file in texts.iterdir())


def test_every_document_comes_back_whole_on_one_side(config, texts):
    prepared = prepare(config, SMALL)
    train, validation = decoded(prepared, prepared.train), decoded(prepared, prepared.validation)
    assert sorted(train + validation) == originals(texts)
    assert not set(train) & set(validation)
    assert 3 <= len(validation) <= 35
    for shards in (prepared.train, prepared.validation):
        stream = shards.window(0, shards.num_tokens)
        starts = shards.document_starts
        assert (stream[starts] == prepared.tokenizer.bos_id).all()
        assert (stream[np.append(starts[1:], len(stream)) - 1] == prepared.tokenizer.eos_id).all()
        assert ((stream == 0).sum(), (stream == 1).sum()) == (len(starts), len(starts))
    assert prepared.tokenizer.vocab_size == 400


def test_bytes_are_those_of_the_text(config):
    prepared = prepare(replace(config, fim_rate=0.5), SMALL)
    for shards in (prepared.train, prepared.validation):
        stream = shards.window(0, shards.num_tokens)
        assert shards.num_bytes == shards.count_bytes(stream)
        assert shards.num_bytes == sum(len(text.encode()) for text in decoded(prepared, shards))
    report = prepared.report
    assert report["bytes"] == report["train"]["bytes"] + report["validation"]["bytes"]


def test_validation_names_and_texts(config, texts):
    prepared = prepare(config, SMALL)
    documents = prepared.read_validation_texts(3)
    assert len(documents) == 3
    for name, text in documents:
        assert (texts.parent / name).read_text("utf-8") == text
    assert prepared.read_validation_texts(1) == documents[:1]


@pytest.mark.parametrize("span", [0, 60])
def test_fill_in_the_middle_rearranges_training_documents_only(config, texts, span):
    prepared = prepare(replace(config, fim_rate=0.5, fim_span=span), SMALL)
    plain = prepare(config, SMALL)
    assert decoded(prepared, prepared.validation, True) == decoded(plain, plain.validation, True)
    gap = re.compile(f".*?{FIM_BEGIN}(.*){FIM_HOLE}(.*){FIM_END}(.*?)<｜end▁of▁sentence｜>", re.DOTALL)
    whole: dict[str, list[str]] = {}
    for name, text in zip(prepared.train.names(), decoded(prepared, prepared.train, True), strict=True):
        if found := gap.fullmatch(text):
            prefix, suffix, middle = found.groups()
            whole.setdefault(name, []).append(prefix + middle + suffix)
            assert not span or len(whole[name][-1]) <= span
    assert 100 < len(whole) < 190
    assert len(whole) == prepared.report["rearranged_documents"]
    for name, parts in whole.items():
        assert "".join(parts) == (texts.parent / name).read_text("utf-8")
        assert span or len(parts) == 1


def test_the_same_settings_are_reused_and_others_are_not(config, texts, capsys):
    first = prepare(config, SMALL)
    assert not first.report["reused"]
    assert prepare(config, SMALL).report["reused"]
    assert "reusing" in capsys.readouterr().err
    others = [
        prepare(replace(config, fim_rate=0.1), SMALL),
        prepare(config, TokenizerConfig(vocab_size=500)),
        prepare(replace(config, seed=1, fim_rate=0.1), SMALL),
    ]
    (texts / "new.txt").write_text("One more document.", "utf-8")
    others.append(prepare(config, SMALL))
    assert not any(other.report["reused"] for other in others)
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_the_result_does_not_depend_on_the_cache_or_on_the_day(config, tmp_path):
    first, second = prepare(config, SMALL), prepare(replace(config, cache=str(tmp_path / "other")), SMALL)
    assert first.fingerprint == second.fingerprint
    for file in first.folder.rglob("*"):
        if file.is_file() and file.name != "report.json":
            assert file.read_bytes() == (second.folder / file.relative_to(first.folder)).read_bytes(), file


def test_an_existing_tokenizer_is_used_as_it_is(config, tmp_path):
    prepare(config, SMALL).tokenizer.save(tmp_path / "mine")
    prepared = prepare(config, TokenizerConfig(vocab_size=512, path=str(tmp_path / "mine")))
    assert prepared.tokenizer.vocab_size == 400
    with pytest.raises(UserError, match="has 400 ids, but vocab_size is 399"):
        prepare(config, TokenizerConfig(vocab_size=399, path=str(tmp_path / "mine")))


def test_an_existing_tokenizer_counts_by_its_content(config, tmp_path):
    mine, moved = tmp_path / "mine", tmp_path / "moved"
    prepare(config, SMALL).tokenizer.save(mine)
    first = prepare(config, TokenizerConfig(vocab_size=400, path=str(mine)))
    mine.rename(moved)
    assert prepare(config, TokenizerConfig(vocab_size=400, path=str(moved))).report["reused"]
    roles = (moved / "tokenizer_config.json").read_text("utf-8")
    (moved / "tokenizer_config.json").write_text(roles.replace("begin▁of", "end▁of"), "utf-8")
    other = prepare(config, TokenizerConfig(vocab_size=400, path=str(moved)))
    assert not other.report["reused"] and other.fingerprint != first.fingerprint
    assert other.tokenizer.bos_id == other.tokenizer.eos_id != first.tokenizer.bos_id


def test_another_version_of_the_tokenizers_library_prepares_anew(config, monkeypatch):
    prepare(config, SMALL)
    monkeypatch.setattr("tokenizers.__version__", "0.0.1")
    assert not prepare(config, SMALL).report["reused"]


def test_skipped_files_are_in_the_report_and_in_a_warning(config, texts, capsys):
    (texts / "latin1.txt").write_bytes("größe".encode("latin-1"))
    report = prepare(config, SMALL).report
    assert report["skipped"] == {"not UTF-8": {"count": 1, "examples": ["texts/latin1.txt"]}}
    assert "warning: data: not used: 1 not UTF-8 (texts/latin1.txt)" in capsys.readouterr().err


def test_a_failure_leaves_nothing_behind(config, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module.ShardWriter, "close", full)
    with pytest.raises(NautileError, match="cannot write"):
        prepare(config, SMALL)
    assert list(Path(config.cache).iterdir()) == []
    monkeypatch.undo()
    assert not prepare(config, SMALL).report["reused"]


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_kill_leaves_nothing_that_looks_finished(config):
    """Killed while tokens are written, prepare leaves no folder under the final name, and the next one succeeds."""
    script = (
        "import sys, time\n"
        "from nautile.data import prepare as module\n"
        "from nautile.data.config import DataConfig\n"
        "from nautile.text.config import TokenizerConfig\n"
        "close = module.ShardWriter.close\n"
        "def stall(self):\n"
        "    close(self)\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n"
        "module.ShardWriter.close = stall\n"
        f"module.prepare({config!r}, TokenizerConfig(vocab_size=400))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout is not None
    assert child.stdout.readline() == b"written\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    left = list(Path(config.cache).iterdir())
    assert left
    assert all(path.name.startswith(".") for path in left)
    prepared = prepare(config, SMALL)
    assert not prepared.report["reused"]
    assert [path.name for path in Path(config.cache).iterdir()] == [prepared.folder.name]


def test_a_folder_of_something_else_is_a_sentence(config, tmp_path):
    prepared = prepare(config, SMALL)
    mistyped = prepared.folder.with_name(prepared.folder.name[:-1])
    with pytest.raises(UserError, match="holds no prepared corpus") as refused:
        PreparedData.open(mistyped)
    assert str(prepared.folder) in refused.value.cure
    with pytest.raises(UserError, match="holds no prepared corpus"):
        PreparedData.open(tmp_path)


def test_shards_have_the_size_asked_for(config):
    prepared = prepare(replace(config, shard_megatokens=0.001), SMALL)
    files = sorted((prepared.folder / "train").glob("*.bin"))
    assert len(files) == -(-prepared.train.num_tokens // 1000)
    assert {file.stat().st_size for file in files[:-1]} == {2000}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"validation_fraction": 0.0}, "validation_fraction 0.0"),
        ({"fim_rate": 1.5}, "fim_rate 1.5"),
        ({"fim_span": -1}, "fim_span -1"),
        ({"max_megabytes": 0.0}, "max_megabytes 0.0"),
        ({"shard_megatokens": 0.0}, "shard_megatokens 0.0"),
        ({"paths": ()}, "source files without paths"),
        ({"source": "python"}, "are not used by source python"),
    ],
)
def test_impossible_settings_are_sentences(config, change, what):
    with pytest.raises(UserError, match=re.escape(what)):
        prepare(replace(config, **change), SMALL)


def test_a_missing_path_names_the_nearest(config, texts):
    with pytest.raises(UserError, match="does not exist") as refused:
        prepare(replace(config, paths=(str(texts.with_name("text")),)), SMALL)
    assert refused.value.cure == f"did you mean {texts}?"


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_corpus_without_text_is_a_sentence(config, tmp_path, content):
    empty = tmp_path / "empty"
    empty.mkdir()
    if content:
        (empty / "latin1.txt").write_bytes(content)
    with pytest.raises(UserError, match="the corpus holds no text") as refused:
        prepare(replace(config, paths=(str(empty),)), SMALL)
    assert ("latin1.txt" in refused.value.why) == bool(content)
    assert not Path(config.cache).exists()


def test_the_default_corpus_is_ready_in_seconds(tmp_path):
    started = time.perf_counter()
    prepared = prepare(DataConfig(cache=str(tmp_path), max_megabytes=1.0), TokenizerConfig(vocab_size=1024))
    assert time.perf_counter() - started < 25
    assert 0.5e6 < prepared.report["bytes"] < 1.5e6
    assert prepared.report["bytes_per_token"] > 2.2
