import json
import os

import pytest

from nautile.core.errors import UserError
from nautile.data.sources.document import EXAMPLES, Skipped
from nautile.data.sources.files import Files
from nautile.data.sources.python_library import PythonLibrary


def read(source):
    skipped = Skipped()
    return {document.name: document.text for document in source.documents(skipped)}, skipped


def test_folder_is_read_with_all_that_is_in_it(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep/er").mkdir(parents=True)
    (folder / ".git").mkdir()
    files = {"b.md": "b", "a.txt": "a\r\nä", "deep/er/c.py": "c = 1", ".git/config": "hidden", ".env": "hidden"}
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbfafter the mark")
    documents, skipped = read(Files((str(folder),), "text"))
    assert list(documents) == ["texts/a.txt", "texts/b.md", "texts/bom.txt", "texts/deep/er/c.py"]
    assert documents["texts/a.txt"] == "a\r\nä"
    assert documents["texts/bom.txt"] == "after the mark"
    assert not skipped.counts


def test_what_is_no_text_is_counted_and_named(tmp_path):
    (tmp_path / "good.txt").write_text("good", "utf-8")
    (tmp_path / "latin1.txt").write_bytes("Übung".encode("latin-1"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "broken.parquet").write_bytes(b"nothing of the kind")
    documents, skipped = read(Files((str(tmp_path),), "text"))
    assert list(documents.values()) == ["good"]
    counts = {reason.partition(":")[0]: count for reason, count in skipped.counts.items()}
    assert counts == {"not UTF-8": 1, "binary": 1, "not parquet": 1}
    assert f"1 not UTF-8 ({tmp_path.name}/latin1.txt)" in skipped.describe()


def test_many_skipped_files_are_counted_but_not_all_named():
    skipped = Skipped()
    for number in range(1000):
        skipped.add(f"{number}.png", "binary")
    assert skipped.counts == {"binary": 1000}
    assert len(skipped.examples["binary"]) == EXAMPLES
    assert skipped.describe() == "1000 binary (0.png, 1.png, 2.png, …)"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_skipped(tmp_path):
    (tmp_path / "secret.txt").write_text("x", "utf-8")
    (tmp_path / "secret.txt").chmod(0)
    assert read(Files((str(tmp_path),), "text"))[1].counts == {"unreadable: Permission denied": 1}


@pytest.mark.parametrize(
    ("name", "content", "cure"),
    [("corpus.txt.gz", b"\x1f\x8b\0\0", "unpack it first"), ("page.pdf", b"%PDF\xff\xfe", "convert it first")],
)
def test_a_file_that_was_named_and_cannot_be_read_is_an_error(tmp_path, name, content, cure):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="cannot be read") as refused:
        Files((str(tmp_path / name),), "text")
    assert cure in refused.value.cure


def test_json_lines(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = ['{"body": "one"}', "", "{broken", '{"body": 5}', r'{"body": "\ud83d"}', '{"body": "zwei ü"}', "[1]"]
    file.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    documents, skipped = read(Files((str(file),), "body"))
    assert documents == {"rows.jsonl:1": "one", "rows.jsonl:6": "zwei ü"}
    assert skipped.counts == {
        "not a JSON object in UTF-8": 3,
        "text field is not a string": 1,
        "not Unicode (half of a surrogate pair)": 1,
    }


def test_a_wrong_text_field_is_an_error_with_the_nearest_name(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"content": "x", "id": 1}), "utf-8")
    with pytest.raises(UserError, match=r"rows\.jsonl:1 has no field 'contents'") as refused:
        read(Files((str(tmp_path),), "contents"))
    assert refused.value.cure == "did you mean 'content'?"


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["one", None, "drei"], "id": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    documents, skipped = read(Files((str(tmp_path / "rows.parquet"),), "text"))
    assert documents == {"rows.parquet:0": "one", "rows.parquet:2": "drei"}
    assert skipped.counts == {"text field is not a string": 1}
    with pytest.raises(UserError, match="has no field 'txt'"):
        read(Files((str(tmp_path),), "txt"))


def test_inventory_changes_with_the_files(tmp_path):
    def inventory():
        return Files((str(tmp_path),), "text").inventory()

    (tmp_path / "a.txt").write_text("a", "utf-8")
    first = inventory()
    assert inventory() == first
    (tmp_path / "b.txt").write_text("b", "utf-8")
    second = inventory()
    (tmp_path / "a.txt").write_text("longer", "utf-8")
    assert len({str(lines) for lines in (first, second, inventory())}) == 3


def test_python_library_is_code_and_reference_without_tests():
    source = PythonLibrary()
    documents, skipped = read(source)
    names = list(documents)
    assert not skipped.counts
    assert {"stdlib/json/decoder.py", "stdlib/asyncio/base_events.py"} <= set(names)
    assert sum(name.startswith("topics/") for name in names) > 50
    assert "assert" in documents["topics/assert"]
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert not [name for name in names if "_sysconfigdata" in name or name == "stdlib/pydoc_data/topics.py"]
    assert "gencodec.py" not in documents["stdlib/encodings/utf_8.py"]
    assert "stdlib/encodings/cp037.py" not in names
    assert 5e6 < sum(map(len, documents.values())) < 50e6
    assert list(read(source)[0]) == names
    assert len(source.inventory()) > 400
