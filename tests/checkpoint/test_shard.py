"""Our safetensors files and the library's are the same; damaged ones are refused with the reason."""

import json
import math
import os
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nautile.checkpoint import shard as shard_module
from nautile.checkpoint.header import DTYPES, TensorInfo
from nautile.checkpoint.shard import ShardReader, ShardWriter
from nautile.core.errors import DiskFullError, NautileError, UserError

KINDS = st.sampled_from(sorted(DTYPES))
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__")
TABLES = st.dictionaries(NAMES, st.tuples(KINDS, SHAPES, st.integers(0, 2**31)), max_size=6)


def random_tensor(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Any bits: NaN and infinity are stored like other numbers. Of booleans, only 0 and 1 exist."""
    dtype = DTYPES[kind]
    generator = torch.Generator().manual_seed(seed)
    most = 2 if dtype == torch.bool else 256
    size = math.prod(shape) * dtype.itemsize
    return torch.randint(0, most, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with ShardWriter(path, kinds, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


@settings(max_examples=60, deadline=None)
@given(table=TABLES)
def test_the_library_reads_what_we_write(table, tmp_path_factory) -> None:
    tensors = {name: random_tensor(*entry) for name, entry in table.items()}
    path = tmp_path_factory.mktemp("ours") / "a.safetensors"
    write(path, tensors, {"format": "pt", "näme": "✓"})
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
        assert file.metadata() == {"format": "pt", "näme": "✓"}
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape, bits(found)) == (tensor.dtype, tensor.shape, bits(tensor))


@settings(max_examples=60, deadline=None)
@given(table=TABLES, data=st.data())
def test_we_read_what_the_library_writes(table, data, tmp_path_factory) -> None:
    tensors = {name: random_tensor(*entry) for name, entry in table.items()}
    path = tmp_path_factory.mktemp("theirs") / "a.safetensors"
    save_file(tensors, path, {"format": "pt"})
    with ShardReader(path) as reader:
        assert set(reader.tensors) == set(tensors)
        for name, tensor in tensors.items():
            found = reader.read(name)
            assert (found.dtype, found.shape, bits(found)) == (tensor.dtype, tensor.shape, bits(tensor))
            if tensor.dim():
                rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 2 and tensor.numel() else tensor
                start = data.draw(st.integers(0, reader.tensors[name].rows[0] if tensor.numel() else 0))
                stop = data.draw(st.integers(start, len(rows) if tensor.numel() else 0))
                assert bits(reader.read_rows(name, start, stop)) == bits(rows[start:stop])


@pytest.mark.parametrize("scratch", [1, 20, 8 << 20])
def test_a_destination_of_another_dtype_or_layout_is_filled_in_portions(scratch, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shard_module, "SCRATCH", scratch)
    source = torch.randn(7, 5, 3)
    write(tmp_path / "a", {"x": source, "0d": torch.tensor(2.5)})
    with ShardReader(tmp_path / "a") as reader:
        room = torch.full((7, 5, 6), torch.nan)
        assert torch.equal(reader.read("x", room[:, :, ::2]), source) and room[:, :, 1::2].isnan().all()
        assert torch.equal(reader.read("x", torch.empty(3, 7, 5, dtype=torch.float64).permute(1, 2, 0)), source)
        half = torch.empty(2, 3, dtype=torch.bfloat16)
        assert reader.read_rows("x", 4, 6, half) is half and torch.equal(half, source.flatten(0, 1)[4:6].bfloat16())
        assert reader.read("0d", torch.empty((), dtype=torch.float16)) == 2.5
        parameter = torch.nn.Parameter(torch.empty(7, 5, 3))
        assert reader.read("x", parameter) is parameter and torch.equal(parameter, source)
        with pytest.raises(ValueError, match=r"\[7, 5\]"):
            reader.read("x", torch.empty(7, 5))
        with pytest.raises(IndexError, match="no rows 33:36"):
            reader.read_rows("x", 33, 36)


@pytest.mark.parametrize("scratch", [1, 20, 8 << 20])
def test_any_layout_is_written_in_any_order(scratch: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shard_module, "SCRATCH", scratch)
    tensors = {"t": torch.randn(4, 6).t(), "s": torch.randn(9, 4)[::2, 1:], "b": torch.randn(3).bfloat16()}
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with ShardWriter(tmp_path / "a", kinds) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name].requires_grad_())
    with ShardReader(tmp_path / "a") as reader:
        for name, tensor in tensors.items():
            assert torch.equal(reader.read(name), tensor)


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    """Readers that map the file view its bytes as numbers, which needs that."""
    write(tmp_path / "a", {"one": torch.ones(3).bool(), "half": torch.ones(3).half(), "wide": torch.ones(3).double()})
    with ShardReader(tmp_path / "a") as reader:
        assert list(reader.tensors) == ["wide", "half", "one"]
        assert all(info.begin % info.dtype.itemsize == 0 for info in reader.tensors.values())
        assert reader.tensors["half"] == TensorInfo(torch.float16, (3,), 24, 30)
    length = int.from_bytes((tmp_path / "a").read_bytes()[:8], "little")
    assert length % 8 == 0


def test_an_unfinished_file_is_not_there(tmp_path: Path) -> None:
    kinds = {"x": (torch.float32, (2,)), "y": (torch.float32, (2,))}
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "a", kinds) as writer:
        writer.write("x", torch.ones(2))
        assert not (tmp_path / "a").exists()
        raise RuntimeError
    with pytest.raises(ValueError, match="not written: y"), ShardWriter(tmp_path / "a", kinds) as writer:
        writer.write("x", torch.ones(2))
    for tensor in (torch.ones(3), torch.ones(2).half()):
        with pytest.raises(ValueError, match="not the announced"), ShardWriter(tmp_path / "a", kinds) as writer:
            writer.write("x", tensor)
    with pytest.raises(ValueError, match="comes twice"), ShardWriter(tmp_path / "a", kinds) as writer:
        writer.write("x", torch.ones(2))
        writer.write("x", torch.ones(2))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path) -> None:
    write(tmp_path / "a", {"x": torch.ones(2)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # larger files fail as on a full disk
    try:
        with pytest.raises(DiskFullError, match="free some space"):
            write(tmp_path / "a", {"x": torch.ones(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with ShardReader(tmp_path / "a") as reader:
        assert torch.equal(reader.read("x"), torch.ones(2))
    with pytest.raises(NautileError, match="cannot write"):
        write(tmp_path / "a" / "b", {"x": torch.ones(2)})


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: list | None = None, dtype: object = "U8") -> dict:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file has 0"),
        (b"PK\x03\x04", "promise a header of"),
        (raw({}, length=2**60), "promise a header of"),
        (raw({}, length=3), "promise a header of 3 bytes, the file has 10"),
        (raw({"a": entry(0, 4)}, b"123"), r"its tensors need \d+ bytes"),
        (raw({"a": entry(0, 4)}, b"12345"), r"its tensors need \d+ bytes"),
        (raw({"a": entry(0, 4), "b": entry(3, 6)}, b"123456"), "b overlaps a"),
        (raw({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"), "b overlaps a"),
        (raw({"a": entry(0, 4), "b": entry(5, 6)}, b"123456"), "b leaves a gap after a"),
        (raw({"a": entry(-4, 0, [4])}), "its offsets are -4 and 0"),
        (raw({"a": entry(0, 10**30, [10**30])}), "need"),
        (raw({"a": entry(0, 4, [2, 3])}, b"1234"), r"a, U8 \[2, 3\], needs 6 bytes"),
        (raw({"a": entry(0, 4, dtype="F64")}, b"1234"), "needs 32 bytes"),
        (raw({"a": entry(0, 4, [-4])}, b"1234"), "not dtype, shape and two offsets"),
        (raw({"a": entry(0, 1, [True])}, b"1"), "not dtype, shape and two offsets"),
        (raw({"a": entry(0, 4, [4.0])}, b"1234"), "not dtype, shape and two offsets"),
        (raw({"a": {"dtype": "U8", "shape": [0]}}), "not dtype, shape and two offsets"),
        (raw({"a": None}), "not dtype, shape and two offsets"),
        (raw([1, 2]), "not a JSON object"),
        (raw(b"{nonsense"), "not JSON"),
        (raw(b'{"\xff": 1}'), "not JSON"),
        (raw(b"[" * 200_000), "not JSON"),
        (raw(b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}'), "dtype' is named twice"),
        (raw(b'{"a": {}, "a": {}}'), "'a' is named twice"),
        (raw(b'{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'), "half of a character"),
    ],
)
def test_damaged_files_are_refused_with_the_reason(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.safetensors: not a whole safetensors file \(.*{said}"):
        ShardReader(tmp_path / "a.safetensors")


def test_a_dtype_that_torch_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(raw({"x": entry(0, 4, [8], "F4")}, b"1234"))
    with pytest.raises(UserError, match="x has dtype F4, which nautile cannot read"):
        ShardReader(tmp_path / "a")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_cut_or_changed_header_never_passes_for_another_error(data, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("cut") / "a"
    write(path, {"x": torch.arange(6.0).reshape(2, 3), "y": torch.arange(3)})
    whole = path.read_bytes()
    with ShardReader(path) as reader:
        data_begin = reader._data
    if data.draw(st.booleans()):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(UserError):
            ShardReader(path)
        return
    at = data.draw(st.integers(0, data_begin - 1))
    path.write_bytes(whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :])
    try:
        with ShardReader(path) as reader:
            for name in reader.tensors:
                reader.read(name)
    except UserError:
        pass


def test_a_file_that_shrinks_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "a", {"x": torch.ones(100)})
    with ShardReader(tmp_path / "a") as reader:
        os.truncate(tmp_path / "a", 200)
        with pytest.raises(UserError, match="it ends before its tensors do"):
            reader.read("x")


def test_a_file_that_is_not_there_and_a_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        ShardReader(tmp_path / "absent")
    with pytest.raises(UserError, match="cannot be read"):
        ShardReader(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    write(tmp_path / "a", {"x": torch.ones(2)})
    (tmp_path / "a").chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        ShardReader(tmp_path / "a")
