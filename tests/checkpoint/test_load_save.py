"""Models survive their folder; saving over an earlier one leaves a whole model whenever it stops."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import nautile
import nautile.models.io
from nautile.checkpoint import load as load_module
from nautile.checkpoint import save as save_module
from nautile.checkpoint.allocate import allocate, meta_device
from nautile.checkpoint.compare import Comparison, compare, targets
from nautile.checkpoint.fp8 import Fp8Format, quantize
from nautile.checkpoint.index import SAFETENSORS
from nautile.checkpoint.layout import Layout
from nautile.checkpoint.load import load_into
from nautile.checkpoint.save import save_from
from nautile.checkpoint.shard import ShardWriter
from nautile.checkpoint.source import open_checkpoint
from nautile.core.errors import DiskFullError, NautileError, UserError
from nautile.models.deepseek_v3.checkpoint import layout
from nautile.models.deepseek_v3.config import V3_NANO
from nautile.models.deepseek_v3.model import DeepseekV3ForCausalLM

SINGLE, INDEX = SAFETENSORS.single, SAFETENSORS.index
SMALL = 300_000


def made(seed: int = 0, config=V3_NANO) -> DeepseekV3ForCausalLM:
    model = DeepseekV3ForCausalLM(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def read(folder: Path, config=V3_NANO) -> DeepseekV3ForCausalLM:
    twin = DeepseekV3ForCausalLM(config)
    with open_checkpoint(folder) as checkpoint:
        load_into(twin, checkpoint, layout(config))
    return twin


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def model() -> DeepseekV3ForCausalLM:
    return made()


def test_shards_and_index_hold_the_same_weights(model: DeepseekV3ForCausalLM, tmp_path: Path) -> None:
    save_from(model, tmp_path, layout(V3_NANO), max_shard_bytes=SMALL)
    index = json.loads((tmp_path / INDEX).read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3 and all((tmp_path / file).stat().st_size < 400_000 for file in files)
    assert names(tmp_path) == files | {INDEX}
    stored = {}
    for file in files:
        with safe_open(tmp_path / file, "pt") as shard:
            stored |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (not a dict)
            assert shard.metadata() == {"format": "pt"}
    assert stored.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert same(read(tmp_path), model)


def test_a_tied_head_is_written_once_and_tied_again(tmp_path: Path) -> None:
    """With an MTP module, whose copy of the head is the embedding, too."""
    model = made(config=replace(V3_NANO, tie_word_embeddings=True))
    nautile.save(model, tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert "lm_head.weight" not in checkpoint.infos
        head = checkpoint.stored(f"model.layers.{V3_NANO.num_hidden_layers}.shared_head.head.weight")
    assert torch.equal(head, model.model.embed_tokens.weight)
    twin = nautile.load(tmp_path)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert same(twin, model)


def test_a_tied_head_that_a_file_repeats_is_not_unexpected(tmp_path: Path) -> None:
    tied = replace(V3_NANO, tie_word_embeddings=True)
    save_from(made(), tmp_path, layout(V3_NANO))
    with open_checkpoint(tmp_path) as checkpoint:
        assert "lm_head.weight" in checkpoint.infos
    assert torch.equal(read(tmp_path, tied).lm_head.weight, made().model.embed_tokens.weight)


@pytest.mark.parametrize("sizes", [(SMALL, 10**9), (10**9, SMALL), (SMALL, SMALL), (10**9, 10**9), (SMALL,) * 3])
def test_saving_over_an_earlier_model_leaves_only_the_new_one(sizes: tuple[int, ...], tmp_path: Path) -> None:
    for seed, size in enumerate(sizes):
        model = made(seed)
        save_from(model, tmp_path, layout(V3_NANO), max_shard_bytes=size)
    assert same(read(tmp_path), model)
    if sizes[-1] == SMALL:
        files = set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())
        assert names(tmp_path) == files | {INDEX}
    else:
        assert names(tmp_path) == {SINGLE}


class Killed(BaseException):
    """The process dies here."""


def killing(step: int, original, counter: list[int]):
    """`original`, dying from the call number `step` on: later calls die, too, so nothing is cleaned up."""

    def call(*arguments, **keywords):
        counter[0] += 1
        if counter[0] >= step:
            raise Killed
        return original(*arguments, **keywords)

    return call


def scaled(seed: int, factor: float) -> DeepseekV3ForCausalLM:
    return made(seed, replace(V3_NANO, routed_scaling_factor=factor))


@pytest.mark.parametrize("old", [SMALL, 10**9])
@pytest.mark.parametrize("new", [SMALL, 10**9])
def test_wherever_saving_is_killed_weights_never_stand_beside_another_configuration(
    old, new, tmp_path, monkeypatch
) -> None:
    """Every rename and every removal of a file is in turn the one before which the process dies."""
    before, after = scaled(1, 2.5), scaled(2, 1.5)
    original = nautile.models.io.save_from

    def save(model, folder, size):
        with monkeypatch.context() as patch:
            patch.setattr(
                "nautile.models.io.save_from", lambda *args, **kw: original(*args, max_shard_bytes=size, **kw)
            )
            nautile.save(model, folder)

    def state(folder) -> str:
        """Which model a reader finds; "none" where it is told that there is none."""
        if not (folder / "config.json").exists():
            with pytest.raises(UserError, match=r"weights without a config.json(?s:.*)interrupted"):
                nautile.load(folder)
            return "none"
        found = nautile.load(folder)
        for name, model in (("before", before), ("after", after)):
            if same(found, model) and found.config == model.config:
                return name
        return "mixture"

    seen = []
    for step in range(1, 200):
        folder = tmp_path / str(step)
        save(before, folder, old)
        counter = [0]
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killing(step, Path.replace, counter))
            patch.setattr(Path, "unlink", killing(step, Path.unlink, counter))
            try:
                save(after, folder, new)
                died = False
            except Killed:
                died = True
        seen.append(state(folder))
        save(after, folder, new)
        assert state(folder) == "after" and not any(name.endswith(".partial") for name in names(folder))
        if not died:
            break
    else:
        raise AssertionError("saving never ended")
    assert seen == sorted(seen, key=["before", "none", "after"].index) and set(seen) == {"before", "none", "after"}


@pytest.mark.parametrize("old", [SMALL, 10**9])
@pytest.mark.parametrize("new", [SMALL, 10**9])
def test_a_rename_that_fails_leaves_the_earlier_model_with_its_configuration(old, new, tmp_path, monkeypatch) -> None:
    save = save_from
    save(made(1), tmp_path, layout(V3_NANO), old, config="old")
    held = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    real = Path.replace

    def failing(self, target):
        if Path(target).name == (SINGLE if new != SMALL else INDEX):
            raise OSError(5, os.strerror(5), str(self))
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing)
        with pytest.raises(NautileError, match="cannot write"):
            save(made(2), tmp_path, layout(V3_NANO), new, config="new")
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == held


def test_bytes_are_on_the_disk_before_names_point_to_them(tmp_path, monkeypatch) -> None:
    """Every file is flushed before its rename, the folder after the switch and before config.json is back."""
    save_from(made(1), tmp_path, layout(V3_NANO), config="old")
    events: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def spied_fsync(handle):
        events.append("sync " + Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    def spied_rename(self, target):
        events.append(f"{self.name} -> {Path(target).name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(Path, "replace", spied_rename)
    save_from(made(2), tmp_path, layout(V3_NANO), config="new")
    flush = f"sync {tmp_path.name}"
    weights, config = f".{SINGLE}.partial", ".config.json.partial"
    order = [event for i, event in enumerate(events) if i == 0 or event != events[i - 1]]
    assert order == [
        f"sync {weights}",
        f"sync {config}",
        "config.json -> .config.json.earlier.partial",
        flush,
        f"{weights} -> {SINGLE}",
        flush,
        f"{config} -> config.json",
        flush,
    ]


@pytest.mark.parametrize("old", [SMALL, 10**9])
@pytest.mark.parametrize("new", [SMALL, 10**9])
def test_a_disk_that_fills_leaves_the_earlier_model_and_nothing_else(old: int, new: int, tmp_path: Path) -> None:
    before = made(1)
    save_from(before, tmp_path, layout(V3_NANO), max_shard_bytes=old)
    held = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL // 2, limits[1]))  # larger files fail as on a full disk
    try:
        with pytest.raises(DiskFullError, match="free some space"):
            save_from(made(2), tmp_path, layout(V3_NANO), max_shard_bytes=new)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == held


def test_a_full_disk_met_when_flushing_is_told_too(model, tmp_path: Path, monkeypatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError):
        save_from(model, tmp_path, layout(V3_NANO), max_shard_bytes=SMALL)
    assert names(tmp_path) == set()


def test_a_folder_that_cannot_be_written_is_a_failure_with_a_cure(model: DeepseekV3ForCausalLM) -> None:
    with pytest.raises(NautileError, match="check or change that path"):
        save_from(model, Path("/dev/full"), layout(V3_NANO))


def test_sharding_keeps_the_order_and_the_limit() -> None:
    sizes = {"a": 4, "b": 5, "c": 20, "d": 1, "e": 9}
    assert save_module.split_shards(sizes, 10) == [["a", "b"], ["c"], ["d", "e"]]


def test_a_wrong_shape_is_named_before_anything_is_allocated(model, tmp_path: Path, monkeypatch) -> None:
    nautile.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "kv_lora_rank": 40}))
    monkeypatch.setattr("nautile.models.io.allocate", lambda *_: pytest.fail("memory was allocated"))
    with pytest.raises(UserError, match=r"kv_a_layernorm.weight is \[32\], not \[40\]"):
        nautile.load(tmp_path)


def test_missing_and_unexpected_tensors_are_listed(model: DeepseekV3ForCausalLM, tmp_path: Path) -> None:
    nautile.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "q_lora_rank": None}))
    with pytest.raises(UserError) as caught:
        nautile.load(tmp_path)
    assert "missing:\n    model.layers.0.self_attn.q_proj.weight" in str(caught.value)
    assert "unexpected:\n    model.layers.0.self_attn.q_a_layernorm.weight" in str(caught.value)


def test_an_unknown_family_is_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v33"}))
    with pytest.raises(UserError, match="nearest of them is deepseek_v3"):
        nautile.load(tmp_path)


def test_a_single_file_is_answered_with_its_folder(model: DeepseekV3ForCausalLM, tmp_path: Path) -> None:
    nautile.save(model, tmp_path)
    with pytest.raises(UserError, match=f"name its folder: {tmp_path}"):
        nautile.load(tmp_path / SINGLE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_converted_while_the_bias_stays_float32(model, dtype: torch.dtype, tmp_path: Path) -> None:
    nautile.save(model, tmp_path)
    loaded = nautile.load(tmp_path, dtype)
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in model.state_dict()
    for name, tensor in model.state_dict().items():
        got = loaded.state_dict()[name]
        assert got.dtype == (torch.float32 if name.endswith("e_score_correction_bias") else dtype)
        assert torch.equal(got, tensor.to(got.dtype))


def test_a_parameter_can_ask_to_stay_float32() -> None:
    with torch.device("meta"):
        module = torch.nn.Linear(3, 2)
        tied = torch.nn.Sequential(module, torch.nn.Linear(3, 2))
        tied[1].weight = module.weight
    module.keep_float32 = ("bias",)
    allocate(tied, torch.bfloat16)
    assert (module.weight.dtype, module.bias.dtype) == (torch.bfloat16, torch.float32)
    assert tied[1].weight is module.weight and not module.weight.is_meta


def test_building_on_the_meta_device_imports_no_compiler(tmp_path: Path) -> None:
    """It takes torch longer to import one than to read a gigabyte."""
    nautile.save(made(), tmp_path)
    script = f"""
import sys, torch, nautile
nautile.load({str(tmp_path)!r})
assert not any(name in sys.modules for name in ("sympy", "torch._dynamo"))
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    with meta_device():
        linear = torch.nn.Linear(3, 2)
        assert linear.weight.is_meta and torch.nn.Embedding(3, 2).weight.is_meta and torch.ones(2).is_meta
    assert torch.nn.Linear(3, 2).weight.abs().sum() > 0  # initialised again outside


def test_loading_keeps_the_number_of_threads(tmp_path: Path) -> None:
    save_from(made(), tmp_path, layout(V3_NANO))
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        read(tmp_path)
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)


def test_large_weights_are_filled_in_portions(tmp_path: Path, monkeypatch) -> None:
    """Portions that neither end with the rows nor with a block; a dtype that needs converting; a column slice."""
    monkeypatch.setattr("nautile.checkpoint.load._JOB", 1000)
    monkeypatch.setattr("nautile.checkpoint.shard.SCRATCH", 700)
    for dtype in (torch.float32, torch.bfloat16):
        source = made(5)
        save_from(source, tmp_path, layout(V3_NANO))
        twin = made(6).to(dtype)
        with open_checkpoint(tmp_path) as checkpoint:
            load_into(twin, checkpoint, layout(V3_NANO))
        assert same(twin, source.to(dtype))


def test_integers_where_numbers_are_needed_are_a_wrong_dtype(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    save_from(model, tmp_path, Layout())
    assert _compared(model, tmp_path).fits
    with torch.no_grad():
        integers = torch.nn.Linear(3, 2)
        integers.weight = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.int64), requires_grad=False)
    save_from(integers, tmp_path, Layout())
    comparison = _compared(model, tmp_path)
    assert comparison.wrong_dtype == ["weight is int64, not a floating dtype that can be read"]
    assert "wrong dtype:\n    weight is int64" in comparison.report()


def _compared(model: torch.nn.Module, folder: Path) -> Comparison:
    with open_checkpoint(folder) as checkpoint:
        return compare(model, checkpoint, Layout())


def test_a_report_is_short_unless_asked_for_all() -> None:
    comparison = Comparison(missing=[f"t{i}" for i in range(7)], wrong_shape=["a is [1], not [2]"])
    assert not comparison.fits and Comparison().fits and Comparison().report() == ""
    assert comparison.report().splitlines()[-3:] == ["    … and 2 more", "  wrong shape:", "    a is [1], not [2]"]
    assert "    t6" in comparison.report(most=None)


def test_experts_that_are_no_range_are_a_sentence(tmp_path: Path) -> None:
    nautile.save(made(), tmp_path)
    with pytest.raises(UserError, match=r"experts \[0, 1\] is no range"):
        nautile.load(tmp_path, experts=[0, 1])


@pytest.mark.parametrize("fp8", [False, True])
def test_portions_cover_every_row_once_and_none_is_larger_than_asked(tmp_path: Path, monkeypatch, fp8: bool) -> None:
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(24, 100, bias=False), "norm": torch.nn.LayerNorm(7)})
    if fp8:
        weight, scales = quantize(torch.randn(100, 24), (16, 16))
        held = {"q_proj.weight": weight, "q_proj.weight_scale_inv": scales}
        config = {"quantization_config": Fp8Format((16, 16)).to_hf()}
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        held = {"q_proj.weight": torch.randn(100, 24)}
    save_file(held | {f"norm.{name}": torch.ones(7) for name in ("weight", "bias")}, tmp_path / SINGLE)
    monkeypatch.setattr(load_module, "_JOB", 10 * 24 * 4)
    with open_checkpoint(tmp_path) as checkpoint:
        jobs = load_module._jobs(targets(model, Layout()), checkpoint)
    rows = [job.rows for job in jobs if job.name == "q_proj.weight"]
    step = 16 if fp8 else 10  # whole blocks, so that no row of scales is expanded twice
    assert rows == [slice(at, min(at + step, 100)) for at in range(0, 100, step)]
    assert [job.rows for job in jobs if "norm" in job.name] == [None, None]
    assert sum(job.out.numel() for job in jobs) == 2414


def test_a_failure_between_shards_leaves_the_earlier_model_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    save_from(made(1), tmp_path, layout(V3_NANO), SMALL, config="old")
    held = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    for method in ("write", "finish", "close"):
        count, real = 0, getattr(ShardWriter, method)

        def failing(self, *arguments, real=real):
            nonlocal count
            count += 1
            if count == 3:
                raise KeyboardInterrupt
            return real(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, method, failing)
            with pytest.raises(KeyboardInterrupt):
                save_from(made(2), tmp_path, layout(V3_NANO), SMALL, config="new")
        assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == held, method


@pytest.mark.parametrize("size", [SMALL, 10**9])
def test_a_failure_after_the_switch_keeps_the_new_weights_and_no_configuration(size, tmp_path, monkeypatch) -> None:
    save_from(made(1), tmp_path, layout(V3_NANO), size, config="old")
    real = Path.replace

    def failing(self, target):
        if self.name == ".config.json.partial":
            raise OSError(5, os.strerror(5), str(self))
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing)
        with pytest.raises(NautileError, match="cannot write"):
            save_from(made(2), tmp_path, layout(V3_NANO), size, config="new")
    assert not (tmp_path / "config.json").exists() and same(read(tmp_path), made(2))
    save_from(made(3), tmp_path, layout(V3_NANO), size, config="{}")
    assert (tmp_path / "config.json").read_text() == "{}" and same(read(tmp_path), made(3))
    assert not any("partial" in name for name in names(tmp_path))
