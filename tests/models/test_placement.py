import pytest
import torch

from nautile.core.errors import UserError
from nautile.models import placement
from nautile.models.placement import torch_device, torch_dtype

HALF = {"torch_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (None, torch.float32),
        ("fp32", torch.float32),
        ("float32", torch.float32),
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("torch.bfloat16", torch.bfloat16),
        ("fp16", torch.float16),
        ("half", torch.float16),
        ("auto", torch.bfloat16),
        (torch.float64, torch.float64),
        (torch.float16, torch.float16),
    ],
)
def test_types_by_every_usual_name(value, dtype):
    assert torch_dtype(value, HALF) is dtype


def test_auto_reads_both_spellings():
    assert torch_dtype("auto", {"dtype": "float16"}) is torch.float16
    assert torch_dtype("auto", {}) is torch.float32


@pytest.mark.parametrize(
    ("value", "published", "what"),
    [
        ("bf6", {}, "dtype 'bf6' is no type to run in"),
        ("int8", {}, "dtype 'int8' is no type"),
        (torch.int8, {}, "dtype torch.int8 is no type"),
        (torch.float8_e4m3fn, {}, "dtype torch.float8_e4m3fn is no type"),
        (torch.complex64, {}, "dtype torch.complex64 is no type"),
        (16, {}, "dtype 16 is no type"),
        ("auto", {"torch_dtype": "float8_e4m3fn"}, "config.json: torch_dtype float8_e4m3fn is no type"),
        ("auto", {"dtype": "int64"}, "config.json: torch_dtype int64 is no type"),
    ],
)
def test_types_that_no_model_runs_in(value, published, what):
    with pytest.raises(UserError) as raised:
        torch_dtype(value, published)
    assert what in raised.value.what


def test_devices(monkeypatch):
    assert torch_device("cpu") == torch_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(placement.torch.cuda, "is_available", lambda: False)
    for value in ("cuda", torch.device("cuda"), "cuda:0", "tpu", "cpu:x", "meta", ""):
        with pytest.raises(UserError, match="there is no device"):
            torch_device(value)
    monkeypatch.setattr(placement.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(placement.torch.cuda, "device_count", lambda: 2)
    assert torch_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="'cuda:2'") as raised:
        torch_device("cuda:2")
    assert "2 of them" in raised.value.why
    with pytest.raises(UserError, match="0 is no device"):
        torch_device(0)


def test_a_model_is_loaded_as_it_is_asked_for_by_name(tmp_path):
    import nautile
    from nautile.models.deepseek_v3.config import V3_NANO
    from nautile.models.deepseek_v3.model import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM(V3_NANO)
    model.init_weights(torch.Generator().manual_seed(0))
    nautile.save(model, tmp_path)
    assert nautile.load(tmp_path).lm_head.weight.dtype is torch.float32
    assert nautile.load(tmp_path, "bfloat16").lm_head.weight.dtype is torch.bfloat16
    assert nautile.load(tmp_path, "auto").lm_head.weight.dtype is torch.float32
    with pytest.raises(UserError, match="float8_e4m3fn is no type"):
        nautile.load(tmp_path, torch.float8_e4m3fn)
    with pytest.raises(UserError, match="no device 'tpu'"):
        nautile.load(tmp_path, device="tpu")
