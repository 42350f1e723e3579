"""Folders that are not whole are refused before a tensor is read, with what is wrong and what to do."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nautile.checkpoint.index import PICKLED, SAFETENSORS
from nautile.checkpoint.source import open_checkpoint
from nautile.core.errors import UserError

TENSORS = {
    "one.safetensors": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).bfloat16()},
    "two.safetensors": {"c": torch.arange(3)},
}
MAP = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file, tensors in TENSORS.items():
        save_file(tensors, tmp_path / file)
    index(tmp_path, {"weight_map": MAP})
    return tmp_path


def index(folder: Path, content: object) -> None:
    (folder / SAFETENSORS.index).write_text(content if isinstance(content, str) else json.dumps(content))


def test_tensors_of_all_files(folder: Path) -> None:
    with open_checkpoint(str(folder)) as checkpoint:
        assert {name: path.name for name, path in checkpoint.files.items()} == MAP
        assert checkpoint.weight_names() == ["a", "b", "c"] and checkpoint.quantization is None
        for tensors in TENSORS.values():
            for name, tensor in tensors.items():
                assert torch.equal(checkpoint.weight(name), tensor)
                assert checkpoint.weight(name).dtype == tensor.dtype == checkpoint.infos[name].dtype
        assert torch.equal(checkpoint.weight("a", rows=slice(1, 2)), TENSORS["one.safetensors"]["a"][1:2])


def test_an_index_goes_before_a_single_file(folder: Path) -> None:
    save_file({"old": torch.ones(1)}, folder / SAFETENSORS.single)
    with open_checkpoint(folder) as checkpoint:
        assert "old" not in checkpoint.infos
    (folder / SAFETENSORS.index).unlink()
    with open_checkpoint(folder) as checkpoint:
        assert list(checkpoint.infos) == ["old"]


def test_a_tensor_that_the_index_forgot_is_there_all_the_same(folder: Path) -> None:
    """So a comparison can say that it is unexpected."""
    index(folder, {"weight_map": {name: MAP[name] for name in "ac"}})
    with open_checkpoint(folder) as checkpoint:
        assert "b" in checkpoint.infos


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "'a' is named twice"),
        ('{"weight_map": {"a": "one.safetensors"}, "weight_map": {}}', "'weight_map' is named twice"),
        ([], "no JSON object"),
        ({"metadata": {}}, "no weight_map"),
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": ["a"]}, "no weight_map"),
        ({"weight_map": {"a": 1}}, "a is said to be in 1, which is not the name of a file"),
        ({"weight_map": {"a": "../one.safetensors"}}, "a is said to be in '../one.safetensors', which is not the name"),
        ({"weight_map": {"a": "/etc/passwd"}}, "which is not the name of a file"),
        ({"weight_map": {"a": "sub/one.safetensors"}}, "which is not the name of a file"),
        ({"weight_map": {"a": "..\\one.safetensors"}}, "which is not the name of a file"),
        ({"weight_map": {"a": ".."}}, "which is not the name of a file"),
        ({"weight_map": {"a": ""}}, "which is not the name of a file"),
        ({"weight_map": {**MAP, "d": "two.safetensors"}}, "d is said to be in two.safetensors; no file has it"),
        ({"weight_map": {**MAP, "a": "two.safetensors"}}, "a is said to be in two.safetensors; it is in one.safetens"),
    ],
)
def test_a_wrong_index_is_told_from_a_right_one(folder: Path, content: object, said: str) -> None:
    index(folder, content)
    with pytest.raises(UserError) as caught:
        open_checkpoint(folder)
    assert said in str(caught.value) and SAFETENSORS.index in str(caught.value)


def test_missing_shards_are_named(folder: Path) -> None:
    (folder / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"two\.safetensors is missing"):
        open_checkpoint(folder)
    index(folder, {"weight_map": MAP | {f"x{i}": f"x{i}.safetensors" for i in range(6)}})
    with pytest.raises(UserError, match=r"two.safetensors, x0.safetensors, x1.safetensors and 4 more are missing"):
        open_checkpoint(folder)


def test_a_tensor_in_two_files_is_ambiguous(folder: Path) -> None:
    save_file({"c": torch.arange(3), "a": torch.ones(2, 3)}, folder / "two.safetensors")
    with pytest.raises(UserError, match=r"a is stored twice, in one\.safetensors and in two\.safetensors"):
        open_checkpoint(folder)


def test_a_cut_shard_is_called_damaged(folder: Path) -> None:
    os.truncate(folder / "one.safetensors", 150)
    with pytest.raises(UserError, match=r"one\.safetensors: not a whole safetensors file"):
        open_checkpoint(folder)


def test_shards_without_an_index(folder: Path) -> None:
    (folder / SAFETENSORS.index).unlink()
    with pytest.raises(UserError, match=r"(?s)one\.safetensors but no .*download model\.safetensors\.index\.json"):
        open_checkpoint(folder)


def test_what_is_no_model_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(UserError, match="an empty folder"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(UserError, match=f"name its folder: {tmp_path}"):
        open_checkpoint(tmp_path / "config.json")


def test_a_damaged_configuration(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        open_checkpoint(folder)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's list of open files")
def test_no_file_stays_open_when_a_folder_is_refused(folder: Path) -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    os.truncate(folder / "two.safetensors", 20)
    before = count()
    with pytest.raises(UserError):
        open_checkpoint(folder)
    assert count() == before


# --- pickled weights ------------------------------------------------------------------------------------------------


def test_pickled_weights_are_refused_unless_allowed(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).bfloat16(), "n": torch.tensor(3)}
    torch.save(tensors, tmp_path / PICKLED.single)
    with pytest.raises(UserError, match=r"(?s)the weights are pickled.*--allow-pickle"):
        open_checkpoint(tmp_path)
    with open_checkpoint(tmp_path, allow_pickle=True) as checkpoint:
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.weight(name), tensor)
        assert torch.equal(checkpoint.weight("a", torch.empty(1, 3).half(), slice(1, 2)), tensors["a"][1:].half())
        checkpoint.weight("a").zero_()
        assert torch.equal(checkpoint.weight("a"), tensors["a"])
    save_file({"s": torch.ones(1)}, tmp_path / SAFETENSORS.single)
    with open_checkpoint(tmp_path) as checkpoint:  # nobody needs the pickled ones then
        assert list(checkpoint.infos) == ["s"]


def test_pickled_shards_follow_their_index(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(
        {"b": torch.zeros(2)}, tmp_path / "pytorch_model-00002-of-00002.bin", _use_new_zipfile_serialization=False
    )
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / PICKLED.index).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="the weights are pickled"):
        open_checkpoint(tmp_path)
    with open_checkpoint(tmp_path, allow_pickle=True) as checkpoint:
        assert torch.equal(checkpoint.weight("a"), torch.ones(2)) and torch.equal(
            checkpoint.weight("b"), torch.zeros(2)
        )
    (tmp_path / PICKLED.index).write_text(json.dumps({"weight_map": {**weight_map, "c": weight_map["a"]}}))
    with pytest.raises(UserError, match="c is said to be in"):
        open_checkpoint(tmp_path, allow_pickle=True)


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_pickled_file_is_not_run(new_format: bool, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Harmful()}, tmp_path / PICKLED.single, _use_new_zipfile_serialization=new_format)
    with pytest.raises(UserError, match=r"(?s)not only tensors.*could run code"):
        open_checkpoint(tmp_path, allow_pickle=True)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("content", [{"state_dict": {"a": torch.ones(1)}}, [torch.ones(1)], {1: torch.ones(1)}])
def test_other_pickled_things_are_not_weights(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / PICKLED.single)
    with pytest.raises(UserError, match="not a table of tensors by name"):
        open_checkpoint(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("keep", [0, 1, 20, 200, 600])
def test_a_cut_pickled_file(keep: int, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(100)}, tmp_path / PICKLED.single)
    os.truncate(tmp_path / PICKLED.single, keep)
    with pytest.raises(UserError, match="damaged"):
        open_checkpoint(tmp_path, allow_pickle=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("new_format", [True, False])
def test_flipped_bytes_of_a_pickled_file_are_a_sentence_or_another_number(new_format: bool, tmp_path: Path) -> None:
    path = tmp_path / PICKLED.single
    torch.save({"a": torch.ones(3), "b.c": torch.ones(2, 2).half()}, path, _use_new_zipfile_serialization=new_format)
    whole = path.read_bytes()
    refused = 0
    for at in range(0, len(whole), 1 + len(whole) // 400):
        for flip in (0xFF, 0x20):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
            try:
                open_checkpoint(tmp_path, allow_pickle=True).close()
            except UserError:
                refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.eye(3).to_sparse(), "is a sparse tensor"),
        (torch.eye(3).to_sparse_csr(), "is a sparse tensor"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "is a quantised tensor"),
        (torch.ones(2, device="meta"), "it is a meta tensor"),
        (torch.ones(2, dtype=torch.complex128), "has dtype complex128"),
    ],
)
def test_odd_pickled_tensors_are_named(tensor: torch.Tensor, said: str, tmp_path: Path) -> None:
    torch.save({"ok": torch.ones(1), "odd": tensor}, tmp_path / PICKLED.single)
    with pytest.raises(UserError, match=rf"'odd' .*{said}"):
        open_checkpoint(tmp_path, allow_pickle=True)


def test_pickled_views_that_stand_for_other_bits_are_resolved(tmp_path: Path) -> None:
    turned = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj()
    tensors = {
        "conj": turned,
        "neg": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        "grad": torch.nn.Parameter(torch.ones(2, 3).t()),
    }
    assert tensors["neg"].is_neg()
    torch.save(tensors, tmp_path / PICKLED.single)
    with open_checkpoint(tmp_path, allow_pickle=True) as checkpoint:
        for name, tensor in tensors.items():
            stored = checkpoint.stored(name)
            assert torch.equal(stored, tensor) and stored.is_contiguous() and not stored.requires_grad
            assert not stored.is_conj() and not stored.is_neg()


def test_half_characters_in_pickled_names(tmp_path: Path) -> None:
    torch.save({"a\udc00": torch.ones(1)}, tmp_path / PICKLED.single)
    with pytest.raises(UserError, match=r"half of a character|damaged"):
        open_checkpoint(tmp_path, allow_pickle=True)
